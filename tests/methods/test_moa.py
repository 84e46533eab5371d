"""MoA: the influence of a weight against its removal, the search against all plans, and windows against explicit masks."""

# The authors' influence (thu-nics/MoA, modify_llama_profile.py, without blocks) was run on the CPU on random queries,
# keys, values and gradients: the same numbers to rounding.

import itertools

import numpy as np
import pytest
import torch
from models import tiny
from reference import attend, causal, close, over_heads, watch

import foveal
from foveal.heads import HeadRoles
from foveal.hub import model_identity
from foveal.methods.keep import moa_profile, moa_search
from foveal.methods.keep.moa import MoA
from foveal.methods.keep.moa_search import Rule, hidden_name, rules, search

N, PROMPT, HEADS, KV, LAYERS, BLOCK = 84, 60, 6, 2, 3, 4
LENGTHS, UNSEEN = (32, 64), 48


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(20))


def made_up(model, reach):
    """A profile in which the influence of head h of layer l is even over distances below reach[l][h] and nothing beyond."""
    scores = {}
    for length in (*LENGTHS, UNSEEN):
        for n in range(1, length // BLOCK - 1):
            left = (torch.as_tensor(reach).double() - n * BLOCK).clamp(min=0) / torch.as_tensor(reach).double()
            scores[hidden_name(length, n)] = left.float()
    source = {"lengths": list(LENGTHS), "unseen": UNSEEN, "block": BLOCK}
    return HeadRoles(model_identity(model), scores, source)


@pytest.fixture(scope="module")
def profile(model, tmp_path_factory):
    reach = torch.tensor([[40, 4, 4, 8, 8, 8], [4, 4, 4, 60, 4, 4], [16, 16, 16, 5, 30, 5]])
    return str(made_up(model, reach).save(tmp_path_factory.mktemp("moa") / "profile.json"))


# ---------------------------------------------------------------------- influence


def test_the_influence_of_a_weight_is_that_of_its_removal():
    """Where the loss is linear in the weights, removing one and bringing the row back to one changes it by just that."""
    weights, grad = torch.rand(5, 7, dtype=torch.float64).softmax(-1), torch.randn(5, 7, dtype=torch.float64)
    found = moa_profile.influence(weights, grad)
    for i, j in itertools.product(range(5), range(7)):
        without = weights[i].clone()
        without[j] = 0
        change = (grad[i] * (without / without.sum() - weights[i])).sum()
        assert found[i, j].item() == pytest.approx(abs(change.item()), abs=1e-12)
    alone = torch.tensor([[1.0, 0.0]])  # the first query has nobody to give its weight to
    assert moa_profile.influence(alone, torch.tensor([[-0.5, 3.0]])).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_blocks_of_influence_are_those_of_the_stock_model(family, ids):
    model = tiny(family, fresh=True)
    prompt, answer = ids[0, :40].tolist(), ids[0, 40:46].tolist()
    probe = moa_profile.InfluenceProbe(8, 7)
    moa_profile._backward(model, probe, prompt, answer)
    model.set_attn_implementation("eager")
    text = torch.tensor([[*prompt, *answer]])
    out = model(inputs_embeds=model.get_input_embeddings()(text).requires_grad_(True), output_attentions=True)
    for a in out.attentions:
        a.retain_grad()
    torch.nn.functional.cross_entropy(out.logits[0, 39:-1], text[0, 40:]).backward()
    for layer, total in probe.total.items():
        a, g = out.attentions[layer][0].detach(), out.attentions[layer].grad[0]
        removed = (a * (g - (g * a).sum(-1, keepdim=True)) / (1 - a).clamp(min=1e-6)).abs()
        removed[:, 0, 0] = (a * g)[:, 0, 0].abs()
        blocks = torch.nn.functional.pad(removed, (0, 10, 0, 10)).unfold(1, 8, 8).unfold(2, 8, 8).sum((-2, -1))
        assert close(total / blocks.max(), blocks / blocks.max(), 1e-4)
    assert sorted(probe.total) == ([0, 1, 2] if family == "llama" else [1, 3])


def test_what_a_window_hides():
    total = torch.arange(16.0).view(1, 4, 4)
    assert moa_profile.hidden_by(total, 1).item() == 9 + 13 + 14  # below the diagonal, the first column apart
    assert moa_profile.hidden_by(total, 2).item() == 13
    assert moa_profile.hidden_by(total, 3).item() == 0


# ---------------------------------------------------------------------- search


def test_the_search_space():
    space = rules(2048, 8192, 16_384)
    assert Rule(0, 1.0) in space and Rule(1024, 0.0) in space and Rule(-1024, 0.625) in space
    assert Rule(1024, 1.0) not in space and Rule(0, 0.0) not in space and Rule(-2048, 1.0) not in space
    assert all(r.alpha % 1024 == 0 for r in space)
    assert Rule(-1024, 0.625).blocks(2048, 64) == -16 + 20 and Rule(0, 0.125).blocks(64, 64) == 1
    assert Rule(100, 0.5).blocks(100, 64) == 1  # floor(1 + 0.78)


def test_greedy_against_all_plans():
    generator = np.random.default_rng(0)
    cost = np.array([[0.1], [0.3], [0.6], [1.0]])
    for budget in (0.25, 0.5, 0.75):
        for _ in range(20):
            # what a wider window uncovers shrinks with its width, as influence does with distance
            steps = -np.sort(-generator.random((4, 3)), axis=1)
            loss = np.concatenate([steps[:, ::-1].cumsum(1)[:, ::-1], np.zeros((4, 1))], 1)
            plan = moa_search._greedy(loss, cost, budget)
            assert cost[plan].mean() <= budget + 1e-9
            feasible = [p for p in itertools.product(range(4), repeat=4) if cost[list(p)].mean() <= budget + 1e-9]
            best = min(loss[range(4), p].sum() for p in feasible)
            widest = max(p for p in feasible if len(set(p)) == 1)
            assert loss[range(4), plan].sum() <= loss[range(4), widest].sum() + 1e-9
            assert loss[range(4), plan].sum() <= best + 0.35 * (loss[:, 0].sum() - best)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_plans_keep_the_budget_at_every_length_and_serve_who_needs_it(budget, model):
    reach = torch.full((LAYERS, HEADS), 6)
    reach[1, 4] = 60
    found = search(made_up(model, reach), budget, KV, BLOCK, range(LAYERS), 512)
    for n in (*LENGTHS, UNSEEN, 128, 256, 512):
        sizes = [min(1.0, (BLOCK + r.blocks(n, BLOCK) * BLOCK) / n) for row in found.values() for r in row]
        assert sum(sizes) / len(sizes) <= budget + 1e-9
    spans = {(layer, g): r.blocks(64, BLOCK) * BLOCK for layer, row in found.items() for g, r in enumerate(row)}
    assert max(spans, key=spans.get) == (1, 1)  # query head 4 belongs to KV head 1
    if budget > 0.3:
        assert spans[1, 1] >= 56


def test_plans_beaten_at_every_length_are_dropped():
    hidden = {32: np.array([[3.0, 2.0, 1.0]]), 64: np.array([[3.0, 1.0, 2.0]])}
    assert moa_search._pareto([(0,), (1,), (2,)], hidden, (32, 64)) == [(1,), (2,)]


# ---------------------------------------------------------------------- windows


def simulate(method, plan, n, chunks):
    """(visible [heads, n, n], held token ids of each KV head after each call) by hand."""
    visible = torch.zeros(HEADS, n, n, dtype=torch.bool)
    held, kept, at = [[] for _ in range(KV)], [], 0

    def windows(tokens):
        return [BLOCK * max(1, int(r.alpha // BLOCK + r.beta * tokens / BLOCK)) for r in plan]

    for piece in [*chunks, *[1] * (n - sum(chunks))]:
        new, decode = list(range(at, at + piece)), piece == 1 and at > 0
        at += piece
        held = [[*row, *new] for row in held]
        for h, w in enumerate(windows(at)):
            for i in new:
                row = held[h // (HEADS // KV)]
                visible[h, i, [j for j in row if j <= i and (j < BLOCK or i - j < w)]] = True
        nexts = windows(at + 1)
        for g in range(KV):
            size = BLOCK + max(nexts[g * 3 : g * 3 + 3]) - 1
            over = min(1, len(held[g]) - size) if decode else len(held[g]) - size
            held[g] = [*held[g][:BLOCK], *held[g][BLOCK + max(0, over) :]]
        kept.append([list(row) for row in held])
    return visible, kept


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("chunks", "pads"), [((PROMPT,), None), ((PROMPT,), (0, 9)), ((30, 20, 10), None)])
def test_windows_are_masks_and_the_store_holds_their_union(together, chunks, pads, model, ids, profile):
    method = MoA(0.5, block=BLOCK, together=together, profile=profile)
    with foveal.attach(model, method) as session:
        plans = {i: session.active[i][0].plan.rules[i] for i in range(LAYERS)}
    assert len({rule for plan in plans.values() for rule in plan}) > 2
    if together:
        assert all(len(set(plan[g * 3 : g * 3 + 3])) == 1 for plan in plans.values() for g in range(KV))
    else:
        assert any(len(set(plan[:3])) > 1 for plan in plans.values())
    seen = watch(model, method, ids, chunks, pads)
    for b, layer, s in seen.each():
        n = s.q.shape[1]
        own = chunks if pads is None else (PROMPT - pads[b],)
        visible, kept = simulate(method, plans[layer], n, own)
        assert [call[layer][b] for call in seen.kept] == kept
        assert close(s.out, attend(s, visible))


def test_uniform_windows_fill_the_budget(model, ids):
    seen = watch(model, MoA(0.5, plan="uniform", block=BLOCK), ids, (PROMPT,))
    assert {len(row) for call in seen.kept[:1] for layer in call for heads in layer for row in heads} == {
        BLOCK + 24 - 1
    }
    for _, _, s in seen.each():
        i, j = torch.arange(PROMPT)[:, None], torch.arange(PROMPT)
        mask = causal(PROMPT) & ((j < BLOCK) | (i - j < 24))
        cut = type(s)(s.q[:, :PROMPT], s.k[:, :PROMPT], s.v[:, :PROMPT], s.out[:, :PROMPT])
        assert close(cut.out, attend(cut, over_heads(mask[None], HEADS)))


def test_the_whole_budget_is_dense_at_any_length(model, ids, profile):
    for method in (MoA(1.0, block=BLOCK, profile=profile), MoA(1.0, plan="uniform", block=BLOCK)):
        assert (watch(model, method, ids, (PROMPT,)).cache.lengths == N).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": 128}, "'moa' keeps some heads whole, so its budget is a share"),
        ({"budget": None}, "budget = None"),
        ({"plan": "best"}, "plan = 'best': expected 'profile' or 'uniform'"),
        ({"together": 1}, "together = 1"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        MoA(**wrong)


def test_a_model_without_a_profile_says_how_to_measure_it(model, profile):
    with pytest.raises(
        foveal.InputError, match=r"no moa profile is known for .*`python -m foveal.methods.keep.moa_profile"
    ):
        foveal.attach(model, MoA(0.5))
    with pytest.raises(foveal.InputError, match="block = 64: the profile was measured in blocks of 4 tokens"):
        foveal.attach(model, MoA(0.5, profile=profile))

"""CompressKV against a plain computation: who votes, what stays, layer budgets, and what the profile measures."""

# The authors' cluster (TUDa-HWAI/CompressKV, methods/compresskv/snapkv_utils.py) was run on the CPU with this model's
# queries and keys, three settings: the same keys stay. Their layer budgets (longbench/pred_compresskv.py) for 200
# random errors of 4 to 32 layers are the same numbers.

import pytest
import torch
from models import tiny
from reference import causal, hook, watch, weights

import foveal
from foveal.heads import HeadRoles
from foveal.hub import model_identity
from foveal.methods.keep import compress_kv_profile as profiling
from foveal.methods.keep.compress_kv import CompressKV

N, PROMPT, HEADS, KV, LAYERS, WINDOW = 64, 60, 6, 2, 3, 8


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(21))


SEMANTIC = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(22))
ERROR = torch.tensor([0.6, 0.1, 0.3])


@pytest.fixture(scope="module")
def roles(model, tmp_path_factory):
    scores = {"semantic": SEMANTIC, "eviction": ERROR[:, None].expand(-1, HEADS).contiguous()}
    return str(HeadRoles(model_identity(model), scores).save(tmp_path_factory.mktemp("ckv") / "profile.json"))


def votes(s, voters, kernel):
    cut = type(s)(s.q[:, :PROMPT], s.k[:, :PROMPT], s.v[:, :PROMPT], s.out[:, :PROMPT])
    mass = weights(cut, causal(PROMPT)[None])[voters, PROMPT - WINDOW :, : PROMPT - WINDOW].sum(1).mean(0)
    return torch.nn.functional.pad(mass, (kernel // 2,) * 2).unfold(0, kernel, 1).mean(-1)


@pytest.mark.parametrize(("voters", "kernel", "pads"), [(2, 5, None), (6, 1, (0, 0)), (1, 3, None)])
def test_the_best_heads_vote_for_all_kv_heads(voters, kernel, pads, model, ids, roles):
    method = CompressKV(24, voters=voters, kernel=kernel, errors="uniform", least=4, roles=roles)
    seen = watch(model, method, ids, (PROMPT,), pads)
    for b, layer, s in seen.each():
        best = SEMANTIC[layer].topk(voters).indices
        vote = votes(s, best, kernel)
        rows = seen.kept[0][layer][b]
        assert rows[0] == rows[1] and len(rows[0]) == 24
        assert rows[0][-WINDOW:] == list(range(PROMPT - WINDOW, PROMPT))
        got = sorted(vote[rows[0][:-WINDOW]].tolist())
        assert got == pytest.approx(sorted(vote.topk(24 - WINDOW).values.tolist()), rel=1e-4)
        assert seen.kept[-1][layer][b] == [[*row, *range(PROMPT, N)] for row in rows]


@pytest.mark.parametrize(
    ("method", "lengths"),
    [
        (CompressKV(20, least=8), [30, 11, 19]),  # 29.6, 11.6, 18.8: the smallest gives one back
        (CompressKV(20, least=8, most=1.2), [24, 14, 22]),  # what the first may not take is handed out evenly
        (CompressKV(40, least=8), [60, 20, 40]),
        (CompressKV(50, least=8), [60, 32, 58]),  # a layer cannot hold more than the text
        (CompressKV(20, errors="uniform"), [20, 20, 20]),
    ],
)
def test_layers_keep_by_their_error(method, lengths, model, ids, roles):
    params = method.params | {"roles": roles, "score": "semantic"}
    seen = watch(model, CompressKV(**params), ids[:, :PROMPT], (PROMPT,))
    got = seen.cache.lengths[:, 0, 0].tolist()
    assert sum(got) == LAYERS * method.budget
    assert got == lengths
    assert (seen.cache.lengths == torch.tensor(got)[:, None, None]).all()


def test_votes_are_for_tokens_where_heads_hold_different_ones(model, ids, roles):
    """After another method thinned the heads apart, a vote still counts for the token it was given to."""

    def thin(step):
        return foveal.edits.Keep(mask=(step.token + torch.arange(KV)[:, None]) % 3 != 0)

    method = CompressKV(20, voters=2, errors="uniform", least=4, roles=roles)
    seen = watch(model, hook(keep=lambda s: None if s.decode else thin(s)) | method, ids[:1, :PROMPT], (PROMPT,))
    for layer, s in enumerate(seen.seqs[0]):
        held = torch.stack([(torch.arange(PROMPT) + g) % 3 != 0 for g in range(KV)])
        visible = causal(PROMPT) & held.repeat_interleave(3, 0)[:, None]
        mass = weights(s, visible)[SEMANTIC[layer].topk(2).indices, PROMPT - WINDOW :, : PROMPT - WINDOW].sum(1).mean(0)
        near = torch.nn.functional.pad(mass, (2, 2)).unfold(0, 5, 1).mean(-1)
        for g in range(KV):
            mine = [t for t in range(PROMPT - WINDOW) if held[g, t]]
            last = [t for t in range(PROMPT - WINDOW, PROMPT) if held[g, t]]
            best = sorted(mine, key=lambda t: -near[t].item())[: 20 - len(last)]
            assert seen.kept[0][layer][0][g] == sorted([*best, *last])


# ---------------------------------------------------------------------- the profile


def test_a_needle_counts_for_every_place_its_token_stands():
    mass = torch.tensor([[[0.5, 0.1]], [[0.2, 0.3]], [[0.9, 0.9]]])  # three steps, one layer, two heads
    score = profiling.needle_score(mass, produced=[7, 8, 9], needle=[7, 8, 8])
    assert torch.allclose(score, torch.tensor([[0.5 + 2 * 0.2, 0.1 + 2 * 0.3]]))


def test_needle_mass_and_eviction_errors_are_those_of_explicit_attention(model, ids, monkeypatch):
    monkeypatch.setattr(profiling, "PROBE", 20)
    project = {i: profiling.output_projection(model, i) for i in range(LAYERS)}
    chosen = {i: SEMANTIC[i].topk(2).indices.tolist() for i in range(LAYERS)}
    needle, error = profiling.NeedleProbe([10, 14]), profiling.ErrorProbe(chosen, project)
    steps = []
    spy = hook(after=lambda step: steps.append((step.layer, dict(needle.record))) if step.decode else None)
    seen = watch(model, needle | error | spy, ids[:1], (PROMPT,))
    expected = torch.zeros(LAYERS, dtype=torch.float64)
    for layer, s in enumerate(seen.seqs[0]):
        w = weights(s, causal(N)[None])
        assert torch.allclose(steps[-1][1][layer].double(), w[:, -1, 10:14].sum(-1), atol=1e-5)
        vote = votes(s, chosen[layer], 5)
        kept = {*vote.topk(20 - WINDOW).indices.tolist(), *range(PROMPT - WINDOW, PROMPT), *range(PROMPT, N)}
        part = weights(s, causal(N)[None] & torch.tensor([t in kept for t in range(N)]))
        value = s.v.repeat_interleave(3, 0)
        full, reduced = ((x @ value).transpose(0, 1).flatten(1) @ project[layer].weight.double().mT for x in (w, part))
        for t in range(PROMPT, N):
            expected[layer] += (reduced[t] - full[t]).norm() / (full[t].norm() + 1e-5)
    assert torch.tensor([error.error[i] for i in range(LAYERS)]).double().tolist() == pytest.approx(
        expected.tolist(), rel=1e-3
    )


def test_bad_values_and_missing_profiles(model, roles):
    with pytest.raises(foveal.InputError, match="errors = 'even': expected 'eviction' or 'uniform'"):
        CompressKV(errors="even")
    with pytest.raises(foveal.InputError, match=r"no compress_kv profile is known .*compress_kv_profile --model"):
        foveal.attach(model, CompressKV())
    with pytest.raises(foveal.InputError, match="no head score 'retrieval'"):
        foveal.attach(model, CompressKV(score="retrieval", roles=roles))


@pytest.mark.model
@pytest.mark.claim
@pytest.mark.xfail(
    strict=True,
    reason="of the seven digits, a token each, all voters keep about one in twelve (best 0.087, all 0.086, worst 0.068): the question "
    "looks at the first digits only",
)
def test_semantic_heads_keep_more_of_the_needle_than_other_heads(default_model, tmp_path):
    """CompressKV (2025): with the question at the end, the four best heads of a layer keep the needle's tokens at 64 keys a layer,
    where the four worst, or all heads together as in SnapKV, keep fewer. Drawn before the run: 0.2 more than the worst, and no
    less than all."""
    from foveal.methods.keep.profiles import profile_for
    from foveal.replay import record
    from foveal.tasks import get_task

    model, tokenizer = default_model
    profile = profile_for(model, "compress_kv")
    turned = HeadRoles(profile.identity, {"semantic": -profile["semantic"], "eviction": profile["eviction"]})
    worst = str(turned.save(tmp_path / "worst.json"))
    methods = {
        "best": CompressKV(64),
        "worst": CompressKV(64, roles=worst),
        "all": CompressKV(64, voters=9),
    }
    kept = dict.fromkeys(methods, 0.0)
    samples = get_task("needle").samples(tokenizer, 512, 3, seed=1, query_aware=True)
    for s in samples:
        text = [tokenizer.decode([t]) for t in s.context]
        (first,) = [i for i in range(len(text) - 7) if "".join(text[i : i + 7]) == s.target]
        reading = record(model, torch.tensor([s.context]), list(methods.values()))
        for name, method in methods.items():
            with torch.no_grad(), foveal.attach(model, method) as session:
                store, _ = reading.replay(session)
            found = [torch.isin(torch.arange(first, first + 7), rows.token[0, 0]).float().mean() for rows in store.rows]
            kept[name] += sum(found).item() / len(found) / len(samples)
    assert kept["best"] >= kept["worst"] + 0.2, kept
    assert kept["best"] >= kept["all"], kept

"""TAPPA against a plain computation: query similarity, layer budgets, who stays, and the peak while the prompt is read."""

# The authors' similarity (MIRALab-USTC/LLM-TAPPA, tappa_qsim.py) and budgets (cake/utils.py), and a choice by their
# scores, were run on the CPU with this model's queries and keys, with and without alpha: the same keys stay in layers
# of equal budgets; budgets differ by one where theirs are cut to whole numbers and ours rounded.

import pytest
import torch
from models import tiny
from reference import causal, hook, watch, weights

import foveal
from foveal.methods.keep import tappa
from foveal.methods.keep.scoring import exact
from foveal.methods.keep.tappa import Tappa, similarity
from foveal.store import LayerStore

N, PROMPT, KV, LAYERS = 64, 60, 2, 3


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(18))


def cosine_of_pairs(q):
    """q [heads, queries, head_dim]: mean over heads and over all pairs of different queries."""
    total, pairs = 0.0, 0
    for head in q:
        for i in range(len(head)):
            for j in range(len(head)):
                if i != j:
                    total += (head[i] @ head[j] / (head[i].norm() * head[j].norm())).item()
                    pairs += 1
    return total / pairs


def test_similarity_is_the_mean_of_all_pairs():
    q = torch.randn(1, 3, 7, 8)
    assert similarity(q).item() == pytest.approx(cosine_of_pairs(q[0]), abs=1e-6)
    assert similarity(q[:, :, :1].expand(-1, -1, 9, -1) * torch.arange(1, 10)[:, None]).item() == pytest.approx(1)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).view(1, 1, 2, 2)
    assert similarity(opposite).item() == pytest.approx(-1)


def likes(seqs, m):
    """The preference of every layer of one sequence, and the weights it rests on."""
    out = []
    for s in seqs:
        cut = type(s)(*(x[:, :PROMPT] for x in s))
        w = weights(cut, causal(PROMPT)[None])[:, PROMPT - m.window :]
        unlike = 1 - cosine_of_pairs(s.q[:, PROMPT - m.window : PROMPT])
        if m.alpha is not None:
            before = w[..., : PROMPT - m.window]
            entropy = -(before * before.clamp(min=1e-300).log()).sum()
            variance = ((before - before.mean(1, keepdim=True)) ** 2).sum() / (m.window - 1)
            unlike = (entropy ** (1 / m.tau_entropy) * variance ** (1 / m.tau_variance)).item() + m.alpha * unlike
        out.append((unlike, w))
    return out


@pytest.mark.parametrize(
    ("method", "pads"),
    [
        (Tappa(24, window=8), None),
        (Tappa(0.5, window=8, gamma=0.0, kernel=1), (0, 0)),
        (Tappa(20, window=12, alpha=0.5), None),
        (Tappa(50, window=8), None),  # a layer that may hold everything hands the rest on
    ],
)
def test_layers_share_the_pool_by_their_preference(method, pads, model, ids):
    seen = watch(model, method, ids, (PROMPT,), pads)
    size = method.budget if isinstance(method.budget, int) else 30
    pool = (size - method.window) * LAYERS
    for b, layers in enumerate(seen.seqs):
        found = likes(layers, method)
        total = sum(like for like, _ in found)
        budgets = exact([pool * like / total for like, _ in found], pool, 1, [PROMPT - method.window] * LAYERS)
        held = [[len(row) for row in seen.kept[0][i][b]] for i in range(LAYERS)]
        assert all(h[0] == h[1] for h in held)
        assert [h[0] - method.window for h in held] == budgets
        assert len(set(budgets)) > 1 or size == 50
        for i, (_, w) in enumerate(found):
            worth = (w.mean(1) + method.gamma * w.var(1)).unflatten(0, (KV, -1)).mean(1)[:, : PROMPT - method.window]
            near = torch.nn.functional.pad(worth, (method.kernel // 2,) * 2).unfold(1, method.kernel, 1).mean(-1)
            for g in range(KV):
                row = seen.kept[0][i][b][g]
                assert row[-method.window :] == list(range(PROMPT - method.window, PROMPT))
                got = sorted(near[g, row[: -method.window]].tolist())
                best = sorted(near[g].topk(budgets[i]).values.tolist())
                assert got == pytest.approx(best, rel=1e-4)
                assert seen.kept[-1][i][b][g] == [*row, *range(PROMPT, N)]


def test_one_sequence_and_a_batch_come_to_the_same(model, ids):
    """Alone a sequence is evicted layer by layer, in a batch after the last layer."""
    both = watch(model, Tappa(24, window=8), ids, (PROMPT,))
    for b in range(2):
        alone = watch(model, Tappa(24, window=8), ids[b : b + 1], (PROMPT,))
        assert [[layer[b]] for layer in both.kept[0]] == alone.kept[0]


def test_while_the_prompt_is_read_the_pool_and_one_layer_are_held(ids):
    model = tiny("llama", num_hidden_layers=8)
    peaks = []
    spy = hook(after=lambda step: peaks.append(sum(int(r.len.sum()) for r in step.pass_.store.rows)))
    with torch.no_grad(), foveal.attach(model, Tappa(16, window=8) | spy):
        model(ids[:1, :PROMPT])
    assert len(peaks) == 8 and min(peaks) == KV * PROMPT
    assert max(peaks) <= KV * (8 * 16 + PROMPT)
    dense = KV * 8 * PROMPT
    assert max(peaks) < 0.5 * dense


def test_layers_give_way_late_and_to_the_same_result(ids, monkeypatch):
    """Earlier layers may be an eighth of the pool above their shares, so each is copied a few times only; what stays is the same."""
    layers, method, applied = 12, Tappa(16, window=4), []
    model, pool = tiny("llama", num_hidden_layers=layers), 12 * layers
    apply = LayerStore.apply
    monkeypatch.setattr(LayerStore, "apply", lambda self, *how: (applied.append(self), apply(self, *how))[1])

    def read(late):
        monkeypatch.setattr(tappa, "LATE", late)
        applied.clear()
        peaks = []
        spy = hook(after=lambda step: peaks.append(sum(int(r.len.sum()) for r in step.pass_.store.rows)))
        with torch.no_grad(), foveal.attach(model, method | spy):
            rows = model(ids[:1, :PROMPT]).past_key_values.rows
        return [r.token for r in rows], max(peaks) / KV - PROMPT, len(applied)

    at_once, least, copies = read(0)
    late, most, fewer = read(1 / 8)
    assert all(torch.equal(a, b) for a, b in zip(at_once, late, strict=True))
    assert least <= pool + method.window * (layers - 1)  # one layer is still to come
    assert least < most <= least + pool / 8
    assert fewer < 0.6 * copies


def test_equal_preferences_are_equal_budgets(model, ids, monkeypatch):
    monkeypatch.setattr(Tappa, "preference", lambda *args: 0.3)
    seen = watch(model, Tappa(24, window=8), ids, (PROMPT,))
    assert {len(row) for layer in seen.kept[0] for heads in layer for row in heads} == {24}


def test_a_prompt_that_fits_is_left_alone(model, ids):
    seen = watch(model, Tappa(PROMPT), ids, (PROMPT,))
    assert (seen.cache.lengths == N).all()


def test_bad_values():
    for wrong, message in (
        ({"window": 1}, "window = 1"),
        ({"gamma": -1.0}, "gamma = -1.0"),
        ({"alpha": -2}, "alpha = -2"),
    ):
        with pytest.raises(foveal.InputError, match=message):
            Tappa(**wrong)

"""SnapKV against explicit attention weights: who stays, when, and that dropping equals masking."""

# The authors' cluster (FasterDecoding/SnapKV, snapkv_utils.py) was run on the CPU with queries and keys of the tiny
# model with as many KV heads as query heads, and the one in FFY0/AdaKV (gqa_func "mean") with those of this one: both
# poolings, two budgets, all layers. The same keys stay, but for which of several equal scores, where max pooling
# makes them, is cut off.

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, watch, weights

import foveal
from foveal.methods.keep.snapkv import SnapKV

N, PROMPT, KV = 70, 60, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(14))


def pooled(x, kernel, how):
    """Neighbours of each number of a list, zero beyond the ends."""
    half = kernel // 2
    near = [[x[j] if 0 <= j < len(x) else 0.0 for j in range(i - half, i + half + 1)] for i in range(len(x))]
    return [max(n) if how == "max" else sum(n) / kernel for n in near]


def expected(s, n, m):
    """Token ids that stay after n tokens, for each KV head."""
    size = m.budget if isinstance(m.budget, int) else math.ceil(m.budget * n - 1e-9)
    cut = type(s)(s.q[:, :n], s.k[:, :n], s.v[:, :n], s.out[:, :n])
    mass = weights(cut, causal(n)[None])[:, n - m.window :].sum(1).unflatten(0, (KV, -1)).mean(1)
    out = []
    for g in range(KV):
        score = pooled(mass[g, : n - m.window].tolist(), m.kernel, m.pooling)
        best = sorted(range(n - m.window), key=lambda j: -score[j])[: max(0, size - m.window)]
        out.append(sorted([*best, *range(n - min(m.window, size), n)]))
    return out


@pytest.mark.parametrize(
    ("method", "pads"),
    [
        (SnapKV(24, window=8), None),
        (SnapKV(0.4, window=8, kernel=5, pooling="avg"), (0, 9)),
        (SnapKV(20, window=12, kernel=1), None),
        (SnapKV(10, window=16), None),  # smaller than the window: the newest ten
    ],
)
def test_the_best_before_the_window_and_the_window_stay(method, pads, model, ids):
    seen = watch(model, method, ids, (PROMPT,), pads)
    for b, layer, s in seen.each():
        n = s.q.shape[1]
        prompt = n - (N - PROMPT)
        kept = expected(s, prompt, method)
        assert seen.kept[0][layer][b] == kept
        for call in range(1, N - PROMPT + 1):  # generated tokens are appended, nothing else leaves
            assert seen.kept[call][layer][b] == [[*row, *range(prompt, prompt + call)] for row in kept]
        visible = causal(n).expand(KV, -1, -1).clone()
        for g, row in enumerate(kept):
            gone = sorted(set(range(prompt)) - set(row))
            visible[g, prompt:, gone] = False
        assert close(s.out, attend(s, visible))


def test_a_prompt_in_chunks_is_compressed_at_its_end_only(model, ids):
    method = SnapKV(24, window=8)
    whole, chunks = watch(model, method, ids, (PROMPT,)), watch(model, method, ids, (25, 20, 15))
    assert all(len(row) == 45 for batch in chunks.kept[1] for heads in batch for row in heads)
    assert chunks.kept[2:] == whole.kept


def turns(model, method, ids, *lengths):
    """What a first layer holds after each turn, [turn][batch][kv_head]."""
    out, at, cache = [], 0, None
    with torch.no_grad(), foveal.attach(model, method):
        for n in lengths:
            cache = model(ids[:, at : at + n], past_key_values=cache).past_key_values
            at += n
            out.append([[sorted(row) for row in heads] for heads in cache.rows[0].token.tolist()])
    return out


def test_a_second_turn_is_appended_to_the_compressed_cache(model, ids):
    first, second, third = turns(model, SnapKV(0.4, window=8), ids, PROMPT, 5, 5)
    assert all(len(row) == 24 for heads in first for row in heads)
    later = [[[*row, *range(PROMPT, PROMPT + 5)] for row in heads] for heads in first]
    assert second == later
    assert third == [[[*row, *range(PROMPT + 5, N)] for row in heads] for heads in later]


def test_a_first_turn_that_fits_leaves_the_compression_to_the_turn_that_does_not(model, ids):
    first, second, third = turns(model, SnapKV(30, window=8), ids, 20, 40, 10)
    assert first == [[list(range(20))] * KV] * 2
    assert second == turns(model, SnapKV(30, window=8), ids, PROMPT)[0]
    assert all(len(row) == 40 for heads in third for row in heads)


def test_rolling_bounds_what_is_held_and_scores_what_is_left(model, ids):
    method = SnapKV(24, window=8, rolling=True)
    chunks = watch(model, method, ids[:1], (30, 20, 10))
    assert chunks.kept[0] == watch(model, SnapKV(24, window=8), ids[:1, :40], (30,)).kept[0]
    s, held = chunks.seqs[0][0], torch.zeros(KV, PROMPT, dtype=torch.bool)
    for g, row in enumerate(chunks.kept[0][0][0]):
        held[g, row] = True
    for call, (start, stop) in enumerate(((30, 50), (50, 60)), 1):
        held[:, start:stop] = True
        z = (s.q[:, stop - 8 : stop] @ s.k[:, :stop].repeat_interleave(3, 0).mT / 4).masked_fill(
            ~(held[:, None, :stop].repeat_interleave(3, 0) & causal(stop)[stop - 8 :]), -torch.inf
        )
        mass = z.softmax(-1).sum(1).unflatten(0, (KV, 3)).mean(1)
        for g in range(KV):
            row = held[g, : stop - 8].nonzero().flatten().tolist()
            score = dict(zip(row, pooled(mass[g, row].tolist(), 7, "max"), strict=True))
            best = sorted(row, key=lambda j: -score[j])[:16]
            kept = sorted([*best, *range(stop - 8, stop)])
            assert chunks.kept[call][0][0][g] == kept
            held[g, :stop] = False
            held[g, kept] = True


def test_sinks_of_the_model_take_their_share_of_the_weights(ids):
    """The learned sinks of a model stand in the denominator, so heads of one KV head do not count alike."""
    model = tiny("gpt_oss", fresh=True)
    for layer in model.model.layers:
        layer.self_attn.sinks.copy_(torch.tensor([-9.0, 0.0, 6.0] * KV))
    seen = watch(model, SnapKV(24, window=8, kernel=1), ids[:1], (PROMPT,))
    for i, s in enumerate(seen.seqs[0]):
        sinks = model.model.layers[(1, 3)[i]].self_attn.sinks.double()
        z = (s.q[:, PROMPT - 8 : PROMPT] @ s.k.repeat_interleave(3, 0)[:, :PROMPT].mT / 4).masked_fill(
            ~causal(PROMPT)[PROMPT - 8 :], -torch.inf
        )
        w = torch.cat([z, sinks.view(-1, 1, 1).expand(-1, 8, 1)], -1).softmax(-1)[..., :-1]
        mass = w.sum(1).unflatten(0, (KV, 3)).mean(1)[:, : PROMPT - 8]
        for g in range(KV):
            assert seen.kept[0][i][0][g] == sorted([*mass[g].topk(16).indices.tolist(), *range(PROMPT - 8, PROMPT)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernel": 4}, "kernel = 4: expected an odd number"),
        ({"window": 0}, "window = 0"),
        ({"pooling": "sum"}, "pooling = 'sum': expected 'max' or 'avg'"),
        ({"rolling": 1}, "rolling = 1: expected True"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        SnapKV(**wrong)

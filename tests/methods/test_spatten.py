"""SpAtten against a simulation layer by layer on explicit attention weights."""

import math
from itertools import pairwise

import pytest
import torch
from models import tiny
from reference import causal, close, over_heads, watch

import foveal
from foveal.methods.keep import spatten
from foveal.methods.keep.spatten import SpAtten, falling, quantised

N, PROMPT, HEADS, KV, LAYERS = 70, 60, 6, 2, 4


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(6))


def attention(s, rows, seen, m, decode):
    """Weights and outputs of some queries: seen [queries, keys]."""
    k, v = over_heads(s.k, HEADS), over_heads(s.v, HEADS)
    z = s.q[:, rows] @ k.mT / 4
    z = z.masked_fill(~seen, -math.inf)
    w = z.softmax(-1).nan_to_num(0.0)
    kept = w
    if decode and m.high is not None:
        bits = m.high + m.low
        q = quantised(s.q[:, rows].float(), bits).double()
        rough, sharp = (
            (q @ quantised(k.float(), bits, read).double().mT / 4).masked_fill(~seen, -math.inf).softmax(-1)
            for read in (m.high, None)
        )
        kept = w = torch.where(rough.amax(-1, keepdim=True) < m.threshold, sharp, rough)
    if decode and m.values < 1:
        count = math.ceil(m.values * int(seen.sum()))
        kept = w.where(w >= w.topk(count, -1).values[..., -1:], 0.0)
    return w, kept @ v


def simulate(layers, prompt, m):
    """Outputs [layer][heads, n, dim], kept token ids [call][layer], importance of each token at the end."""
    n = layers[0].q.shape[1]
    shares = falling(m.budget, LAYERS, 0.15)
    counts = [max(1, round(x * HEADS)) for x in falling(m.heads, LAYERS, 0.3)]
    total, alive = torch.zeros(n).double(), set(range(prompt))
    held, outs, calls = [], [torch.zeros(HEADS, n, 16).double() for _ in layers], []
    for last in range(prompt, n + 1):
        decode, sizes, gone = last > prompt, torch.zeros(HEADS).double(), None
        rows = [last - 1] if decode else [*range(prompt)]
        for layer, s in enumerate(layers):
            if decode:
                held[layer].add(last - 1)
            else:
                held.append(set(alive))
            here = torch.zeros(n, dtype=torch.bool)
            here[sorted(held[layer])] = True
            seen = causal(n)[rows] & here & (torch.ones(1, 1, dtype=torch.bool) if decode else here[rows, None])
            w, out = attention(s, rows, seen, m, decode)
            going = torch.ones(HEADS).double()
            if counts[layer] < HEADS:
                going = torch.zeros(HEADS).double().index_fill(0, sizes.topk(counts[layer]).indices, 1.0)
            outs[layer][:, rows] = out * going[:, None, None]
            sizes += (out * going[:, None, None]).abs().sum((1, 2))
            total += (w * going[:, None, None]).sum((0, 1))
            if not decode and layer + 1 < LAYERS and math.ceil(shares[layer + 1] * prompt - 1e-9) < prompt:
                ranked = sorted(held[layer], key=lambda t: (t != last - 1, -total[t].item()))
                alive = set(ranked[: math.ceil(shares[layer + 1] * prompt - 1e-9)])
            if decode:
                if gone not in held[layer]:
                    over = shares[layer] < 1 and len(held[layer]) > math.ceil(shares[layer] * last - 1e-9)
                    gone = min(held[layer] - {last - 1}, key=lambda t: total[t].item()) if over else None
                held[layer].discard(gone)
        calls.append([sorted(h) for h in held])
    return outs, calls, total


@pytest.mark.parametrize(
    ("method", "pads"),
    [
        (SpAtten(0.5), None),
        (SpAtten(0.6, heads=0.6), (0, 9)),
        (SpAtten(0.8, values=0.2), None),
        (SpAtten(0.7, high=4, low=4, threshold=0.3), (0, 9)),
        (SpAtten(1.0, heads=0.5), None),
    ],
)
def test_cascade(method, pads, model, ids):
    seen = watch(model, method, ids, (PROMPT,), pads)
    for b in range(2):
        layers = seen.seqs[b]
        outs, calls, total = simulate(layers, layers[0].q.shape[1] - (N - PROMPT), method)
        for layer, s in enumerate(layers):
            assert close(s.out, outs[layer], 2e-5)
            assert [call[layer][b] for call in seen.kept] == [[call[layer]] * KV for call in calls]
        token, plane = seen.planes["token"][0][b], seen.planes["importance"][0][b]
        real = len(total)
        assert close(plane[0, token[0].argsort()[:real]], total, 1e-3)


def test_sets_are_nested_and_as_large_on_average_as_asked(model, ids):
    seen = watch(model, SpAtten(0.5), ids, (PROMPT,))
    for call in seen.kept:
        for b in range(2):
            sets = [set(layer[b][0]) for layer in call]
            assert all(small <= large for large, small in pairwise(sets))
            assert sets[0] > sets[-1]
    assert abs(seen.cache.lengths.double().mean().item() / N - 0.5) < 0.03


def test_importances_are_what_was_attended(model, ids):
    """Nothing dropped: they add up to one for each layer, head and query."""
    seen = watch(model, SpAtten(1.0), ids, (25, 35))
    assert close(seen.planes["importance"][0].sum(-1), torch.full((2, KV), float(LAYERS * HEADS * N)), 0.1)


def test_a_prompt_in_chunks_is_dense_until_its_last(model, ids):
    seen = watch(model, SpAtten(0.5), ids, (25, 35))
    assert all(row == list(range(25)) for layer in seen.kept[0] for heads in layer for row in heads)
    assert len(seen.kept[1][-1][0][0]) < PROMPT / 2


@pytest.mark.parametrize("method", [SpAtten(0.5), SpAtten(0.6, heads=0.6)])
def test_a_list_of_who_goes_on_and_a_mask_come_to_the_same(method, model, ids, monkeypatch):
    """The list serves a prompt read at once, the mask one read in chunks, where the host does not know who asks."""
    by_list = watch(model, method, ids, (PROMPT,))
    monkeypatch.setattr(spatten, "_by_id", lambda step: False)
    by_mask = watch(model, method, ids, (PROMPT,))
    assert by_list.kept == by_mask.kept
    for (_, _, a), (_, _, b) in zip(by_list.each(), by_mask.each(), strict=True):
        assert torch.equal(a.out, b.out)
    assert all(torch.equal(*x) for x in zip(by_list.planes["importance"], by_mask.planes["importance"], strict=True))


def test_bits():
    x = torch.randn(50, 16)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((quantised(x, 8) - x).abs() <= step / 2 + 1e-6).all()
    coarse = quantised(x, 8, 4)
    assert ((coarse - quantised(x, 8)).abs() <= 8 * step + 1e-6).all()
    assert max(len(row.unique()) for row in (coarse / step).round()) <= 16


@pytest.mark.parametrize(("threshold", "bits"), [(0.0, 4), (2.0, 8)])
def test_the_threshold_decides_how_much_is_read(threshold, bits, model, ids):
    """0: never the low bits; above 1: always, which is plain 8-bit."""
    seen = watch(model, SpAtten(1.0, high=4, low=4, threshold=threshold), ids, (PROMPT,))
    s, last = seen.seqs[0][0], N - 1
    key = quantised(over_heads(s.k, HEADS).float(), 8, None if bits == 8 else 4).double()
    w = (quantised(s.q[:, last:].float(), 8).double() @ key.mT / 4).softmax(-1)
    assert close(s.out[:, last:], w @ over_heads(s.v, HEADS))


@pytest.mark.parametrize(("mean", "layers"), [(0.5, 30), (0.25, 30), (0.125, 30), (0.9, 12), (0.5, 3), (1.0, 5)])
def test_schedules_keep_the_mean(mean, layers):
    shares = falling(mean, layers, 0.15)
    assert math.isclose(sum(shares) / layers, mean) and shares == sorted(shares, reverse=True)
    assert shares[0] == 1 and min(shares) > 0
    if mean == 0.5 and layers == 30:
        assert shares[:5] == [1.0] * 5 and shares[5] < 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": 20}, "budget = 20: .* a share, not a count"),
        ({"heads": 0}, "heads = 0"),
        ({"values": 2}, "values = 2"),
        ({"high": 12, "low": 8}, "at most 16 bits"),
        ({"high": 1}, "high = 1"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        SpAtten(**wrong)

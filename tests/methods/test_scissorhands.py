"""Scissorhands against a simulation on explicit attention weights."""

import math
from itertools import accumulate, pairwise

import pytest
import torch
from models import tiny
from reference import attend, causal, close, over_heads, watch, weights

import foveal
from foveal.method import Method
from foveal.methods.keep.scissorhands import Scissorhands, ramped
from foveal.ops import formats
from foveal.store import Layout

N, PROMPT, HEADS, KV = 84, 60, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(6))


def simulate(s, prompt, m, budget=None):
    """(visible [kv_heads, n, n], kept token ids after each call, counters [kv_heads, n]) by masking columns; budget: the layer's own."""
    n, budget = s.q.shape[1], m.budget if budget is None else budget
    visible = causal(n).expand(KV, -1, -1).clone()
    low, gone, kept = torch.zeros(KV, n).double(), torch.zeros(KV, n, dtype=torch.bool), []
    ends = [prompt] if isinstance(prompt, int) else list(accumulate(prompt))
    for first, last in pairwise([0, *ends, *range(ends[-1] + 1, n + 1)]):
        rows = slice(first, last)
        visible[:, rows] &= ~gone[:, None]
        looked_at = slice(max(first, last - m.window), last)
        if last - first >= m.window and last in ends:
            low[:] = 0
        seen = over_heads(visible, HEADS)
        w = weights(s, seen)[:, looked_at]
        t = seen[:, looked_at].sum(-1, keepdim=True)
        below = (w < (1 - 1e-6) / t) & seen[:, looked_at]
        low += below.sum(1).double().unflatten(0, (KV, -1)).sum(1)
        size = budget if isinstance(budget, int) else math.ceil(budget * last - 1e-9)
        if not (m.rolling or last >= ends[-1]):
            size = last
        for g in range(KV):
            held = [t for t in range(last) if not gone[g, t]]
            if len(held) <= size:
                continue
            left = max(min(size, len(held) - max(1, int(m.drop * size))), m.recent)
            older = [t for t in held if t < last - m.recent]
            for t in sorted(older, key=lambda t: (-low[g, t].item(), t))[: len(held) - left]:
                gone[g, t] = True
        kept.append([[t for t in range(last) if not gone[g, t]] for g in range(KV)])
    return visible, kept, low


@pytest.mark.parametrize(
    ("method", "pads"),
    [
        (Scissorhands(20, window=30, recent=5), None),
        (Scissorhands(20, window=400, recent=1, drop=0.1), (0, 9)),
        (Scissorhands(0.4, window=30, recent=8, drop=0.25), (0, 9)),
        (Scissorhands(0.3, window=7, recent=3), None),
        (Scissorhands(12, recent=12), None),
    ],
)
def test_dropping_is_masking(method, pads, model, ids):
    seen = watch(model, method, ids, (PROMPT,), pads)
    for b, layer, s in seen.each():
        visible, kept, low = simulate(s, s.q.shape[1] - (N - PROMPT), method)
        assert [call[layer][b] for call in seen.kept] == kept
        assert close(s.out, attend(s, visible))
        token, plane = seen.planes["token"][layer][b], seen.planes["low"][layer][b]
        for g, held in enumerate(kept[-1]):
            assert close(plane[g, token[g].argsort()[: len(held)]], low[g, held], 1e-4)


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
def test_never_more_than_the_budget_and_always_the_newest(drop, model, ids):
    method = Scissorhands(20, recent=6, drop=drop)
    seen = watch(model, method, ids, (PROMPT,))
    sizes = set()
    for call, layers in enumerate(seen.kept):
        newest = set(range(PROMPT + call - 6, PROMPT + call))
        for row in (row for batch in layers for heads in batch for row in heads):
            assert len(row) <= 20 and newest <= set(row)
            sizes.add(len(row))
    # the cache moves between what a compression leaves and the budget
    assert (min(sizes), max(sizes)) == (max(6, 20 - max(1, int(drop * 20)) + 1), 20)


def test_one_key_below_uniform_leaves_where_the_history_is_one_query(model, ids):
    seen = watch(model, Scissorhands(PROMPT - 1, window=1, recent=1, drop=0.0), ids[:, :PROMPT], (PROMPT,))
    for b, layer, s in seen.each():
        w = weights(s, causal(PROMPT)[None])[:, -1].unflatten(0, (KV, -1))
        for g, held in enumerate(seen.kept[0][layer][b]):
            (gone,) = set(range(PROMPT)) - set(held)
            often = (w[g, :, :-1] < 1 / PROMPT).sum(0)
            assert often[gone] == often.max() > 0
            assert gone == int(often.argmax())  # of equals, the oldest


def test_while_it_fits_it_is_dense(model, ids):
    seen = watch(model, Scissorhands(N), ids, (25, 35))
    for _, _, s in seen.each():
        assert close(s.out, attend(s, causal(N)[None]))
    assert (seen.cache.lengths == N).all()


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize(("window", "chunks"), [(400, (25, 20, 15)), (18, (25, 20, 15)), (14, (30, 16, 4, 10))])
def test_the_history_of_a_prompt_in_chunks(window, chunks, rolling, model, ids):
    """It begins in the last chunk with as many queries as the window, and eviction in between sees what it would have seen."""
    method = Scissorhands(20, window=window, recent=5, rolling=rolling)
    seen = watch(model, method, ids, chunks)
    for b, layer, s in seen.each():
        visible, kept, _low = simulate(s, chunks, method)
        assert [call[layer][b] for call in seen.kept] == kept
        assert close(s.out, attend(s, visible))


@pytest.mark.parametrize(("budget", "each"), [(20, (12, 28)), (0.4, (0.24, 0.56))])
def test_later_layers_may_hold_more(budget, each, model, ids):
    """A layer compresses when it is full, whatever the others do."""
    method = Scissorhands(budget, recent=5, drop=0.25, ramp=0.4)
    seen = watch(model, method, ids, (PROMPT,))
    for b, layer, s in seen.each():
        visible, kept, _low = simulate(s, PROMPT, method, each[layer])
        assert [call[layer][b] for call in seen.kept] == kept
        assert close(s.out, attend(s, visible))


def test_a_ramp_keeps_the_mean():
    assert ramped(1000, 0.5, 5) == (500, 750, 1000, 1250, 1500)
    assert sum(ramped(101, 0.3, 7)) == 707 and ramped(0.2, 0.0, 3) == (0.2, 0.2, 0.2) and ramped(1, 0.0, 1) == (1,)
    assert sum(ramped(0.2, 0.7, 9)) == pytest.approx(1.8)


def test_nothing_leaves_before_the_prompt_is_read(model, ids):
    method = Scissorhands(20, recent=5)
    seen = watch(model, method, ids, (25, 35))
    assert all(len(row) == 25 for batch in seen.kept[0] for heads in batch for row in heads)
    whole = watch(model, method, ids, (PROMPT,))
    assert seen.kept[1:] == whole.kept


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"drop": 1}, "drop = 1 "),
        ({"rolling": 1}, "rolling = 1: expected True"),
        ({"ramp": 1}, "ramp = 1: expected a number from 0 to 0.99"),
        ({"budget": 0.8, "ramp": 0.5}, "more than everything in the last layer"),
        ({"window": 0}, "window = 0: .*at least 1"),
        ({"recent": 0}, "recent = 0"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        Scissorhands(**wrong)


def test_four_bits_are_stored_and_not_only_meant(model, ids):
    """Keys and values come back as the codes of what was kept; bytes follow."""
    plain = watch(model, Scissorhands(20, recent=5), ids[:, :PROMPT], (PROMPT,))
    coded = watch(model, Scissorhands(20, recent=5, bits=4), ids[:, :PROMPT], (PROMPT,))
    assert coded.kept == plain.kept
    for name in ("key", "value"):
        for a, b in zip(plain.planes[name], coded.planes[name], strict=True):
            want = formats.decode(*formats.encode(a, "int4"), "int4", torch.float32)
            assert close(b, want, 1e-6) and not close(a, b, 1e-3)
    with torch.no_grad(), foveal.attach(model, "scissorhands(budget=0.5, bits=8)") as session:
        assert [rows.layout.format for rows in session.new_store().rows] == ["int8"] * 2


def test_a_format_goes_with_a_layout_or_is_refused(model):
    four, eight = Scissorhands(20, bits=4), Scissorhands(20, bits=8)
    with foveal.attach(model, four, layout=Layout(format="fp8")) as session:
        assert session.new_store().rows[0].layout.format == "fp8"  # the session's word counts
    with pytest.raises(foveal.InputError, match="stores keys as 'int4', in pages"):
        foveal.attach(model, four, layout=Layout(paged=False))
    with pytest.raises(foveal.FovealError, match="store keys as int4 and as int8"):
        type("Other", (Method,), {"format": "int4"})() | type("Another", (Method,), {"format": "int8"})()
    with pytest.raises(foveal.InputError, match="bits = 3"):
        Scissorhands(bits=3)
    assert eight.format == "int8" and Scissorhands().format is None

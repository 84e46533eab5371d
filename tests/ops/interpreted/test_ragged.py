"""The decode kernels in Triton's interpreter against the plain path, which gathers and takes a softmax."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.ops import paged_attention as op
from foveal.ops.gpu import pages as moves
from foveal.ops.gpu.ragged import Wanted, launch
from foveal.ops.pages import Pages, append_page_keys, drop_page_keys
from foveal.ops.ragged import Logit
from foveal.ops.recent import Recent
from foveal.ops.route import Route


def make(lengths, group, dim, *, size=32, value_dim=None, dtype=torch.float32, format=None, seed=0, spare=2):
    g = torch.Generator().manual_seed(seed)
    counts = [-(-n // size) for n in lengths]
    total, value_dim = sum(counts) + spare, value_dim or dim
    order = torch.randperm(total, generator=g).to(torch.int32)
    table = torch.zeros(len(lengths), max(max(counts), 1), dtype=torch.int32)
    used = 0
    for row, n in enumerate(counts):
        table[row, :n] = order[used : used + n]
        used += n
    key, value = (torch.randn(total, size, d, generator=g).to(dtype) for d in (dim, value_dim))
    stored = {"key": key, "value": value}
    if format is not None:
        from foveal.ops.formats import encode

        for name in ("key", "value"):
            stored[name], stored[name + "_scale"] = encode(stored[name], format)
    pages = Pages(
        table=table, length=torch.tensor(lengths, dtype=torch.int32), bound=max(lengths), format=format, **stored
    )
    return torch.randn(len(lengths), group, dim, generator=g).to(dtype), pages


def both(q, pages, logit, *, want="", extra=None, **how):
    scales = None if pages.format is None else (pages.key_scale, pages.value_scale)
    asked = Wanted(want == "weights", want == "mass")
    out, lse, x = launch(
        q, pages.key, pages.value, pages.table, pages.length, pages.bound, logit.scale, softcap=logit.softcap,
        sinks=logit.sinks, extra=extra, format=pages.format, scales=scales, want=asked, **how,
    )  # fmt: skip
    plain = {"slots": None, "run": 1, "own": False, "moved": None, "window": None} | how
    listed = (plain["slots"], plain["run"], plain["own"])
    wide = q.double() if q.dtype == torch.float32 else q
    return (out, lse, x), op._torch(wide, pages, logit, extra, listed, plain["moved"], plain["window"], want)


def close(got, expected, dtype=torch.float32, weights=False):
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    out, lse, x = got
    torch.testing.assert_close(out.double(), expected.out.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected.lse.double(), rtol=tolerance, atol=tolerance)
    if weights:
        torch.testing.assert_close(x.double(), expected.weights.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("group", "dim"), [(1, 64), (3, 64), (3, 96), (4, 128), (7, 64), (7, 96), (9, 96), (9, 128), (16, 64), (16, 128)]
)
def test_odd_groups_and_head_sizes(group, dim):
    q, pages = make([300 if dim == 128 else 100, 1, 64, 33], group, dim)
    close(*both(q, pages, Logit(dim**-0.5)))


def test_large_heads_and_values_of_another_size():
    q, pages = make([70, 5], 4, 256, value_dim=64)
    close(*both(q, pages, Logit(0.1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, pages = make([300, 1, 64, 130], 4, 128, dtype=dtype)
    close(*both(q, pages, Logit(128**-0.5)), dtype)


@pytest.mark.parametrize("lengths", [[0, 5], [0, 0], [1], [32], [33], [31, 0, 64, 65]])
def test_empty_rows_and_page_edges(lengths):
    q, pages = make(lengths, 3, 64)
    if max(lengths) > 0:
        close(*both(q, pages, Logit(0.125)))
    out, lse, _ = launch(q, pages.key, pages.value, pages.table, pages.length, max(1, pages.bound), 0.125)
    empty = pages.length == 0
    assert (out[empty] == 0).all() and lse[empty].isneginf().all()


@pytest.mark.parametrize("want", ["weights", "mass"])
def test_weights_and_their_sum_over_the_group(want):
    q, pages = make([200, 1, 90], 3, 64)
    got, expected = both(q, pages, Logit(0.125), want=want)
    close(got, expected, weights=True)
    total = got[2].sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 1.0 if want == "weights" else 3.0))


def test_soft_cap_and_sink_logits_count():
    q, pages = make([200, 3], 4, 64)
    logit = Logit(0.5, 3.0, torch.randn(2, 4))
    close(*both(q, pages, logit, want="weights"), weights=True)


def test_extra_may_hide_keys_and_whole_rows():
    q, pages = make([200, 40], 3, 64)
    extra = torch.randn(2, 3, 200)
    extra[0, :, 10:150] = -torch.inf
    extra[1, 0] = -torch.inf
    got, expected = both(q, pages, Logit(0.125), extra=extra, want="weights")
    close(got, expected, weights=True)
    assert (got[0][1, 0] == 0).all() and got[1][1, 0].isneginf()


def test_lists_of_slots_with_gaps():
    q, pages = make([200, 40], 3, 64)
    slots = torch.stack([torch.randperm(200)[:70], torch.randint(0, 40, (70,))]).to(torch.int32)
    slots[:, 40:55] = -1
    slots[1, 5:] = -1
    close(*both(q, pages, Logit(0.125), slots=slots, want="weights"), weights=True)


@pytest.mark.parametrize("run", [4, 16, 32])
def test_runs_of_slots_and_the_newest_key(run):
    q, pages = make([200, 40, 1], 3, 64)
    slots = torch.tensor([[0, 96, 192, -1], [32, 0, -1, -1], [0, -1, -1, -1]], dtype=torch.int32)
    got, expected = both(q, pages, Logit(0.125), slots=slots, run=run, own=True, want="weights")
    close(got, expected, weights=True)
    assert (got[2][:, :, -1] > 0).all() and (got[0][2] == got[0][2, :1]).all()


def test_moved_keys_stand_for_the_first_slots():
    q, pages = make([200, 3], 3, 64)
    close(*both(q, pages, Logit(0.125), moved=torch.randn(2, 4, 64)))


@pytest.mark.parametrize("window", [(4, 60), (0, 1), (0, 64), (64, 512)])
def test_first_and_last_keys_only(window):
    q, pages = make([200, 3, 64], 3, 64)
    close(*both(q, pages, Logit(0.125), window=window, want="mass"), weights=True)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_codes_are_read_as_what_they_stand_for(format, dim):
    q, pages = make([130, 1, 40], 4, dim, format=format)
    close(*both(q, pages, Logit(dim**-0.5), want="weights"), weights=True)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_under_half_precision_queries(format, dtype):
    q, pages = make([130, 1, 40], 4, 64, dtype=dtype, format=format)
    close(*both(q, pages, Logit(0.125), want="weights"), dtype, weights=True)


@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=6).filter(any),
    st.integers(1, 9),
    st.sampled_from([16, 32, 64]),
    st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_any_lengths(lengths, group, size, seed):
    q, pages = make(lengths, group, 64, size=size, seed=seed)
    close(*both(q, pages, Logit(0.125), want="mass"), weights=True)


def test_lengths_change_under_the_same_launch():
    q, pages = make([200, 100], 3, 64)
    pages.length.copy_(torch.tensor([7, 63], dtype=torch.int32))
    close(*both(q, pages, Logit(0.125)))


def state(lengths, size=4, dim=8, format=None):
    _, pages = make(lengths, 1, dim, size=size, format=format, spare=8)
    table = torch.nn.functional.pad(pages.table, (0, 4))
    total = pages.key.shape[0]
    used = {int(p) for row, n in zip(table, lengths, strict=True) for p in row[: -(-n // size)]}
    free = [p for p in range(total) if p not in used]
    stack = torch.zeros(total, dtype=torch.int32)
    stack[: len(free)] = torch.tensor(free, dtype=torch.int32)
    token = torch.full((len(lengths), table.shape[1] * size), 2**31 - 1, dtype=torch.int32)
    pages = Pages(
        pages.key, pages.value, table, pages.length, table.shape[1] * size, format, pages.key_scale, pages.value_scale
    )
    return pages, stack, torch.tensor([len(free)], dtype=torch.int32), token


def content(pages):
    """Keys and values of each row, in slot order."""
    found = []
    for row, n in enumerate(pages.length.tolist()):
        slots = torch.arange(n).expand(pages.rows, -1)
        found.append([pages.gather(name, slots, torch.float32)[row] for name in ("key", "value")])
    return found


def same(a, b):
    for (k, v), (other_k, other_v) in zip(content(a), content(b), strict=True):
        torch.testing.assert_close(k, other_k)
        torch.testing.assert_close(v, other_v)


def with_recent(pages, window=32, seed=0):
    """The last keys of each row as they came, as if the row's slots had been mixed before; unlike their codes, to tell them apart."""
    g = torch.Generator().manual_seed(seed)
    dims = [x.shape[2] * (2 if pages.format == "int4" else 1) for x in (pages.key, pages.value)]
    recent = Recent.start(pages.rows, window, pages.bound, *(torch.empty(0, d) for d in dims))
    for name, d in zip(("key", "value"), dims, strict=True):
        getattr(recent, name).copy_(torch.randn(pages.rows, window, d, generator=g))
    for row, n in enumerate(pages.length.tolist()):
        slots = torch.randperm(n, generator=g)[: window - 3]  # some places hold nothing
        recent.slot[row, torch.randperm(window, generator=g)[: len(slots)]] = slots.to(torch.int32)
    recent.refresh()
    return dataclasses.replace(pages, recent=recent)


LISTED = torch.tensor([[0, 64, -1, 88], [32, -1, 0, -1], [0, 8, 16, 24]])


READ = [
    {},
    {"slots": LISTED, "run": 8, "own": True},
    {"slots": LISTED},
    {"window": (4, 50)},
    {"extra": True},
    {"moved": True},
]
# Every way with both formats, and both with every result.
NEWEST = [
    (format, how, ("", "weights", "mass")[(i + j) % 3])
    for i, how in enumerate(READ)
    for j, format in enumerate(("int4", "fp8"))
]


@pytest.mark.parametrize(("format", "how", "want"), NEWEST)
def test_the_newest_keys_are_read_as_they_came(format, how, want, monkeypatch):
    q, pages = make([100, 70, 33], 3, 64, format=format)
    pages, how = with_recent(pages), dict(how)
    if "extra" in how:
        how["extra"] = torch.randn(3, 3, pages.bound)
    if "moved" in how:
        how["moved"] = torch.randn(3, 12, 64)
    plain = op.attend_ragged(q, pages, Logit(0.2, None, torch.randn(3, 3)), want=want, **how)
    ignored = op.attend_ragged(q, dataclasses.replace(pages, recent=None), Logit(0.2), **how)
    assert not torch.allclose(plain.out, ignored.out, atol=1e-2)
    plain = op.attend_ragged(q, pages, Logit(0.2), want=want, **how)
    monkeypatch.setattr(op, "_route", lambda *a, **k: Route("triton", "interpreted"))
    got = op.attend_ragged(q, pages, Logit(0.2), want=want, **how)
    torch.testing.assert_close(got.out, plain.out, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(got.lse, plain.lse, rtol=1e-3, atol=1e-3)
    if want:
        torch.testing.assert_close(got.weights, plain.weights, rtol=2e-2, atol=1e-3)


def test_what_comes_of_the_newest_keys_has_the_queries_dtype():
    q, pages = make([100, 70, 33], 3, 64, format="int4")
    got = op._with_overlay(q.bfloat16(), with_recent(pages), Logit(0.2), None, (None, 1, False), None, None, "")
    assert got.out.dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_moved_keys_go_with_codes(format, monkeypatch):
    q, pages = make([200, 7, 33], 3, 64, format=format)
    moved = torch.randn(3, 12, 64)
    asked = {"want": "weights", "moved": moved}
    plain, x = op.attend_ragged(q, pages, Logit(0.2), **asked), op.page_logits(q, pages, Logit(0.2), moved=moved)
    monkeypatch.setattr(op, "_route", lambda *a, **k: Route("triton", "interpreted"))
    got = op.attend_ragged(q, pages, Logit(0.2), **asked)
    torch.testing.assert_close(got.out, plain.out, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(got.weights, plain.weights, rtol=2e-2, atol=1e-3)
    found = op.page_logits(q, pages, Logit(0.2), moved=moved)
    for row, n in enumerate(pages.length.tolist()):
        torch.testing.assert_close(found[row, :, :n], x[row, :, :n], rtol=1e-2, atol=2e-3)


def test_logits_of_the_newest_keys_are_theirs(monkeypatch):
    q, pages = make([200, 70, 33], 3, 64, format="int4")
    pages = with_recent(pages)
    plain = op.page_logits(q, pages, Logit(0.2))
    monkeypatch.setattr(op, "_route", lambda *a, **k: Route("triton", "interpreted"))
    got = op.page_logits(q, pages, Logit(0.2))
    for row, n in enumerate(pages.length.tolist()):
        torch.testing.assert_close(got[row, :, :n], plain[row, :, :n], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("window", [0, 32])
@pytest.mark.parametrize("format", [None, "int8", "fp8", "int4"])
def test_appends_and_drops_equal_the_plain_ones(format, window):
    first, second = (state([4, 7, 1], format=format) for _ in range(2))
    if window:
        first, second = ((with_recent(s[0], window), *s[1:]) for s in (first, second))
    g = torch.Generator().manual_seed(3)
    for step in range(12):
        slot = torch.tensor([step % 3 - 1, 2, -1])
        if step % 3 == 2:
            drop_page_keys(*first[:3], slot)
            moves.drop(*second[:3], slot)
        elif step < 5:
            key, value = torch.randn(2, 3, 8, generator=g)
            if format == "fp8":  # numbers it holds exactly: the interpreter loses the carry where it rounds
                key, value = (x.mul(100).to(torch.float8_e4m3fn).float() for x in (key, value))
                key[:, 0] = value[:, 0] = 448
            ids = torch.full((3,), step, dtype=torch.int32)
            append_page_keys(*first[:3], key, value, first[3], ids)
            moves.append(*second[:3], key, value, second[3], ids)
        assert torch.equal(first[0].length, second[0].length) and torch.equal(first[2], second[2])
        assert torch.equal(first[3], second[3])
        same(first[0], second[0])
        if window:
            assert torch.equal(first[0].recent.slot, second[0].recent.slot)
            torch.testing.assert_close(first[0].recent.hidden, second[0].recent.hidden)


def test_a_page_emptied_is_used_again_at_once():
    pages, free, top, token = state([4, 5])
    before = int(top)
    last = int(pages.table[1, 1])
    moves.drop(pages, free, top, torch.tensor([-1, 0]))
    assert int(top) == before + 1
    moves.append(pages, free, top, torch.ones(2, 8), torch.ones(2, 8), token, torch.zeros(2, dtype=torch.int32))
    assert last in (int(pages.table[0, 1]), int(pages.table[1, 1]))

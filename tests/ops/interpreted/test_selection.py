"""The Triton kernels of scores, choices and token lists, under Triton's interpreter, against the PyTorch paths."""

import math

import pytest
import torch

from foveal.ops import scores, tokens, top

antidiagonals = pytest.importorskip("foveal.ops.gpu.antidiagonals", reason="needs triton")
pooled = pytest.importorskip("foveal.ops.gpu.pooled", reason="needs triton")
window = pytest.importorskip("foveal.ops.gpu.window", reason="needs triton")
gpu_top = pytest.importorskip("foveal.ops.gpu.top", reason="needs triton")
gpu_top_blocks = pytest.importorskip("foveal.ops.gpu.top_blocks", reason="needs triton")
gpu_tokens = pytest.importorskip("foveal.ops.gpu.tokens", reason="needs triton")

DTYPES = [torch.float32, torch.bfloat16]
# Products of bfloat16 are exact in float32 and add up there; only weights times values are rounded to bfloat16.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
ROUNDED = {torch.float32: TOLERANCE, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
HEADS = [(2, 2), (6, 2), (4, 1), (7, 1), (9, 1)]


def rand(*shape, dtype=torch.float32, seed=0):
    """Laid out as models hand it over: [batch, length, heads, dim] seen as [batch, heads, length, dim]."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype).transpose(1, 2)


def close(found, expected, **tolerance):
    torch.testing.assert_close(found.float(), expected.float(), **(tolerance or TOLERANCE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 9])
def test_page_bound(group, dtype):
    for dim, pages in ((96, 70), (20, 1)):
        q, lo = rand(3, 1, group, dim, dtype=dtype)[:, :, 0], rand(3, 1, 2 * pages, dim, dtype=dtype)[:, :, 0][:, ::2]
        hi = lo + rand(3, pages, 1, dim, dtype=dtype)[:, 0].abs()
        count = torch.tensor([pages, max(1, pages // 2), 0], dtype=torch.int32)
        for how in ("max", "sum", "mean", None):
            for rest in ((None, 1, 0, 0), (count, 1, 1, 2), (count * 5 - (count > 0).int(), 5, 0, 1)):
                options = dict(zip(("count", "size", "keep_first", "keep_last"), rest, strict=True))
                close(
                    pooled.launch_bound(q, lo, hi, how or "none", *rest),
                    scores.page_bound(q, lo, hi, group=how, **options),
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_pool_blocks(pool, dtype):
    for length, size in ((77, 16), (5, 8), (4, 1), (130, 50)):
        x = rand(2, length, 2, 24, dtype=dtype)
        close(pooled.launch_pool(x, size, pool), scores.pool_blocks(x, size, pool))


@pytest.mark.parametrize(("softcap", "dtype"), [(None, torch.float32), (None, torch.bfloat16), (3.0, torch.float32)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1)])
def test_window_scores(heads, kv_heads, dtype, softcap, monkeypatch):
    monkeypatch.setattr(window, "WINDOW_KEYS", 64)
    for length, total, last in ((40, 100, 40), (70, 70, 67), (1, 33, 1)):
        q, k = rand(1, length, heads, 24, dtype=dtype), rand(1, total, kv_heads, 24, dtype=dtype)
        found = window.launch_window(q, k, last, 0.3, softcap)
        for ours, plain in zip(found, scores.window_scores(q, k, last, scale=0.3, softcap=softcap), strict=True):
            close(ours, plain)


@pytest.mark.parametrize(("causal", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
def test_antidiagonal_scores(heads, kv_heads, dtype, causal, monkeypatch):
    monkeypatch.setattr(antidiagonals, "SCRATCH", 1000)  # a few heads at a time
    monkeypatch.setattr(antidiagonals, "antidiagonal_settings", lambda dim, itemsize: (16, 16, 16, 4))
    for length, total, block, stride in ((50, 50, 16, 4), (21, 40, 8, 8), (5, 18, 8, 1)):
        q, k = rand(1, length, heads, 32, dtype=dtype), rand(1, total, kv_heads, 32, dtype=dtype)
        found = antidiagonals.launch_antidiagonal(q, k, block, stride, 0.4, causal)
        expected = scores.antidiagonal_scores(q, k, block, stride, scale=0.4, causal=causal)
        close(found.masked_fill(expected == -math.inf, -math.inf), expected)


# ---------------------------------------------------------------------- choices


def rows_of(kind, *shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "ties":
        x = (x * 2).round() * 0.5
        x[x == 0] = torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, -0.0)[x == 0]
    if kind == "hidden":
        x = x.masked_fill(torch.rand(shape, generator=g) < 0.5, -math.inf)
        x[..., 0, :] = -math.inf
    if kind == "wide":
        x = x * 10.0 ** torch.randint(-30, 30, shape, generator=g)
    return x


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("kind", ["plain", "ties", "hidden", "wide"])
def test_top_slots(kind, long, monkeypatch):
    if long:  # a long row is shared out to many programs, bfloat16 by two digits
        monkeypatch.setattr(gpu_top, "IN_REGISTERS", 0)
    cases = [(1, 20, 1, False), (150, 20, 16, True), (150, 200, 1, True), (150, 200, 1, False)]
    cases += [(700, 300, 2, True)] * long
    for n, k, unit, some in cases:
        x = rows_of(kind, 3, n).to(torch.bfloat16 if n == 700 else torch.float32)
        f = torch.rand(3, n) < 0.05 if some else None
        c = torch.tensor([7, 0, 1000], dtype=torch.int32) if some else None
        assert torch.equal(gpu_top.launch_slots(x, k, f, c, unit), top.top_slots(x, k, f, count=c, unit=unit)), (n, k)
    half = rows_of(kind, 4, 90).bfloat16()
    assert torch.equal(gpu_top.launch_slots(half[:, ::2], 9), top.top_slots(half[:, ::2], 9))


def test_how_many_are_chosen_of_a_long_row():
    x = rows_of("hidden", 3, 700)
    count = torch.tensor([9, 400, 900], dtype=torch.int32)
    slots, found = gpu_top.launch_long(x, 500, None, count)
    assert found.tolist() == (slots >= 0).sum(1).tolist() and found[0] == 0 and 0 < found[2] < 500


@pytest.mark.parametrize("launch", [gpu_top.launch_slots, lambda *x: gpu_top.launch_long(*x)[0]], ids=["one", "many"])
def test_one_number_for_all_rows_may_be_a_view(launch):
    """As `expand` gives it, with a stride of zero: what lies behind it in memory is another's."""
    x, behind = rows_of("plain", 3, 150), torch.tensor([7, 0, 3])
    slots = launch(x, 20, None, behind[:1].expand(3))
    assert torch.equal(slots, top.top_slots(x, 20, count=torch.full((3,), 7)))


def test_marked_slots():
    g = torch.Generator().manual_seed(5)
    for n, k in ((1, 3), (700, 40), (9000, 4000)):
        mask = (torch.rand(4, 2 * n, generator=g) < 0.3)[:, :n]
        mask[1], mask[2] = False, True
        assert torch.equal(gpu_top.launch_marked(mask, k), top.marked_slots(mask, k))


@pytest.mark.parametrize("kind", ["plain", "ties", "hidden", "wide"])
def test_top_blocks(kind):
    for nq, nk, size, past, shape in (
        (3, 13, (8, 2), 6, (0, 0, True, True)),
        (3, 13, (8, 2), 6, (1, 2, False, True)),
        (1, 40, (1, 1), 39, (0, 1, True, False)),
        (5, 3, (4, 8), 3, (0, 0, False, True)),
    ):
        x = rows_of(kind, 1, 1, nq, nk)
        names = dict(zip(("keep_first", "keep_last", "diagonal", "causal"), shape, strict=True))
        names |= {"size": size, "past": past}
        each = torch.randint(0, nk + 2, (1, 1, nq), dtype=torch.int32)
        found = gpu_top_blocks.launch_blocks(x, each, 0.0, True, *size, past, *shape)
        assert torch.equal(found, top.top_blocks(x, k=each, **names)), (nq, nk, each, shape)
        for mass, normalize in ((0.2, "softmax"), (0.9, "softmax"), (0.7, "sum")):
            found = gpu_top_blocks.launch_blocks(x, None, mass, normalize == "softmax", *size, past, *shape)
            assert torch.equal(found, top.top_blocks(x, mass=mass, normalize=normalize, **names)), (nq, nk, mass, shape)


# ---------------------------------------------------------------------- token lists


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"),
    [(*h, torch.float32) for h in HEADS] + [(7, 1, torch.bfloat16), (6, 2, torch.bfloat16)],
)
def test_attend_tokens(heads, kv_heads, dtype, monkeypatch):
    monkeypatch.setattr(gpu_tokens, "WALK", 16)
    for length, total, size, m in ((2, 40, 1, 21), (5, 9, 4, 7), (12, 70, 12, 50), (1, 12, 1, 0)):
        q, k = rand(1, length, heads, 24, dtype=dtype), rand(1, total, kv_heads, 24, dtype=dtype)
        v = rand(1, total, kv_heads, 40, dtype=dtype, seed=1)
        for lists in (kv_heads, heads):
            slots = torch.rand(1, lists, -(-length // size), total).argsort(-1)[..., :m]
            slots = slots.masked_fill(torch.rand(slots.shape) < 0.3, -1)
            for shape in (None, heads):
                queries = None if shape is None else torch.rand(1, shape, length) < 0.5
                rows, counts, spread = tokens._rows(q, slots, size, queries)
                out, lse = gpu_tokens.launch(q, k, v, spread, rows, counts, size, 0.3)
                plain, plain_lse = tokens.attend_tokens(
                    q, k, v, slots, scale=0.3, size=size, queries=queries, need_lse=True
                )
                close(lse, plain_lse)
                close(out, plain, **ROUNDED[dtype])


@pytest.mark.parametrize("rows", [4, 60, 200])
def test_attend_tokens_as_launched_in_bfloat16(rows):
    """Whole tiles of the real settings: rows of one list, more than one step of keys."""
    q, k, v = (rand(1, n, h, 64, dtype=torch.bfloat16) for n, h in ((rows // 4, 4), (300, 1), (300, 1)))
    slots = torch.rand(1, 1, 1, 300).argsort(-1)[..., :150].sort(-1).values
    size = rows // 4
    out, lse = gpu_tokens.launch(q, k, v, slots, None, None, size, 0.2)
    plain, plain_lse = tokens.attend_tokens(q, k, v, slots, scale=0.2, size=size, need_lse=True)
    close(lse, plain_lse)
    close(out, plain, **ROUNDED[torch.bfloat16])


# ---------------------------------------------------------------------- one node for torch.compile


def test_operators_describe_their_results():
    """What the fake implementations promise is what comes out."""
    q, k, v = rand(1, 9, 4, 16), rand(1, 13, 2, 16), rand(1, 13, 2, 24)
    row, pages, x = torch.randn(3, 2, 16), torch.randn(3, 5, 16), torch.randn(1, 4, 3, 5)
    slots = torch.randint(0, 13, (1, 2, 3, 4), dtype=torch.int32)
    checks = ("test_schema", "test_faketensor")
    for op, args in (
        (pooled.page_bound, (row, pages, pages + 1, "max", None, 1, 1, 1)),
        (pooled.page_bound, (row, pages, pages + 1, "none", torch.tensor([1, 2, 3]), 2, 0, 0)),
        (pooled.pool_blocks, (q, 4, "mean")),
        (window.window_scores, (q, k, 5, 0.3, None)),
        (antidiagonals.antidiagonal_scores, (q, k, 4, 2, 0.3, True)),
        (gpu_top.top_slots, (torch.randn(3, 20), 4, None, None, 1)),
        (gpu_top.marked_slots, (torch.rand(3, 20) < 0.5, 4)),
        (gpu_top_blocks._top_blocks, (x, None, 0.5, True, 4, 4, 8, 0, 0, True, True)),
        (gpu_tokens.attend_tokens, (q, k, v, slots, None, None, 3, 0.3)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)


def test_operations_take_the_kernels(monkeypatch):
    """Where a kernel can run, the public functions hand it the right arguments."""
    q, k, v = rand(1, 10, 4, 16), rand(1, 14, 2, 16), rand(1, 14, 2, 24)
    row, pages, x = torch.randn(3, 2, 16), torch.randn(3, 5, 16), torch.randn(1, 4, 3, 5)
    slots = torch.rand(1, 2, 4, 14).argsort(-1)[..., :6]
    queries = torch.rand(1, 4, 10) < 0.6
    where = {"size": 4, "past": 6, "keep_first": 1}
    calls = [
        lambda: scores.page_bound(
            row, pages, pages + 1, group=None, count=torch.tensor([9, 5, 1]), size=2, keep_last=1
        ),
        lambda: scores.page_bound(row, pages, pages + 1, group="sum", keep_first=1),
        lambda: scores.pooled_scores(q, k, 4, 3, scale=0.3, pool="max"),
        lambda: scores.antidiagonal_scores(q, k, 4, 2, scale=0.3),
        lambda: scores.window_scores(q, k, 5, scale=0.3, softcap=2.0),
        lambda: top.top_blocks(x, k=2, keep_last=1, diagonal=False, size=4, past=6),
        lambda: top.top_blocks(x, k=torch.tensor([1, 2, 3], dtype=torch.int32), **where),
        lambda: top.top_blocks(x, mass=0.7, **where),
        lambda: top.top_blocks(x.exp(), mass=0.7, normalize="sum", causal=False, **where),
        lambda: top.top_slots(x[0, 0], 3, x[0, 0] < -1, count=torch.tensor([1, 2, 3]), unit=4),
        lambda: top.marked_slots(x[0, 0] > 0, 3),
        lambda: tokens.attend_tokens(q, k, v, slots, scale=0.3, size=3, queries=queries, need_lse=True),
        lambda: tokens.attend_tokens(q, k, v, slots, scale=0.3, size=3, sinks=torch.ones(4), need_lse=True),
    ]
    plain = [call() for call in calls]
    taken = []
    for module in (scores, top, tokens):
        monkeypatch.setattr(module, "no_kernel", lambda x: taken.append(1))
    for number, (call, expected) in enumerate(zip(calls, plain, strict=True)):
        taken.clear()
        found = call()
        assert taken, number
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda m, n=number: f"call {n}: {m}")

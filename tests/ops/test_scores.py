"""Scores to choose by, each against its definition written out in float64."""

import math

import pytest
import torch

from foveal.errors import InputError
from foveal.ops import scores as ops
from foveal.ops.route import which

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-4}
HEADS = [(2, 2), (6, 2), (4, 1), (7, 1), (9, 1)]
LENGTHS = [(1, 1), (1, 9), (7, 7), (13, 30), (40, 40)]


def problem(heads, kv_heads, length, total, dtype=torch.float32, batch=2, dim=16):
    g = torch.Generator().manual_seed(heads * 1000 + total)

    def rand(*shape):  # strided, as models hand it over
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)

    return rand(batch, length, heads, dim), rand(batch, total, kv_heads, dim)


def spread(k, q):
    return k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)


def agrees(found, expected, dtype=torch.float32):
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


def first_seen(length, total, query_block, key_block):
    """Whether any query of a block sees any key of another, bool [nq, nk]: from single tokens."""
    see = torch.ones(length, total).tril(total - length)
    rows = [see[a : a + query_block].any(0) for a in range(0, length, query_block)]
    return torch.stack(
        [torch.stack([row[b : b + key_block].any() for b in range(0, total, key_block)]) for row in rows]
    )


# ---------------------------------------------------------------------- pages


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 9])
def test_page_bound(group, dtype):
    q, keys = problem(group, 1, 1, 35, dtype, batch=3)
    q, pages = q[:, :, 0], keys[:, 0].split(8, 1)
    lo, hi = (torch.stack([getattr(p, f)(1) for p in pages], 1) for f in ("amin", "amax"))
    alone = torch.maximum(
        q.double()[:, :, None] * lo.double()[:, None], q.double()[:, :, None] * hi.double()[:, None]
    ).sum(-1)
    agrees(ops.page_bound(q, lo, hi, group=None), alone, dtype)
    agrees(ops.page_bound(q, lo, hi), alone.amax(1, keepdim=True), dtype)
    agrees(ops.page_bound(q, lo, hi, group="sum"), alone.sum(1, keepdim=True), dtype)
    agrees(ops.page_bound(q, lo, hi, group="mean"), alone.mean(1, keepdim=True), dtype)
    exact = torch.stack([(q.double() @ p.double().mT).amax(-1) for p in pages], -1)
    assert (alone >= exact - 1e-9).all()


def test_page_bound_forces_what_a_row_holds():
    q, lo = torch.randn(3, 2, 8), torch.randn(3, 6, 8)
    bound = ops.page_bound(q, lo, lo + 1, count=torch.tensor([6, 4, 1]), keep_first=1, keep_last=2)[:, 0]
    inf = math.inf
    finite = torch.tensor([[inf, 0, 0, 0, inf, inf], [inf, 0, inf, inf, -inf, -inf], [inf] + [-inf] * 5])
    assert torch.equal(bound.where(bound.isinf(), 0.0), finite)
    keys = {"count": torch.tensor([16, 12, 1]), "size": 3, "keep_first": 1, "keep_last": 2}
    assert torch.equal(ops.page_bound(q, lo, lo + 1, **keys)[:, 0], bound)  # keys held, three a page
    plain = ops.page_bound(q, lo, lo + 1)[:, 0]
    assert torch.equal(bound[bound.isfinite()], plain[bound.isfinite()])


# ---------------------------------------------------------------------- pooled blocks


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_pooled_scores(heads, lengths, dtype, pool):
    q, k = problem(*heads, *lengths, dtype)
    full_k = spread(k, q)

    def pooled(x, size):
        parts = x.double().split(size, 2)
        return torch.stack([p.mean(2) if pool == "mean" else p.amax(2) for p in parts], 2)

    for query_block, key_block in ((8, 8), (8, 3), (5, 16)):
        found = ops.pooled_scores(q, k, query_block, key_block, scale=0.3, pool=pool)
        expected = 0.3 * pooled(q, query_block) @ pooled(full_k, key_block).mT
        agrees(ops.pooled_scores(q, k, query_block, key_block, scale=0.3, pool=pool, causal=False), expected, dtype)
        seen = first_seen(*lengths, query_block, key_block)
        agrees(found, expected.masked_fill(~seen, -math.inf), dtype)


# ---------------------------------------------------------------------- antidiagonals


def antidiagonal(q, k, block, stride, scale, causal):
    """Algorithm 1 of XAttention from the whole matrix of logits: the softmax of summed antidiagonals, summed over blocks."""
    (length, total), past = (q.shape[2], k.shape[2]), k.shape[2] - q.shape[2]
    x = scale * q.double() @ spread(k, q).mT
    rows, columns = -(-length // stride), -(-total // stride)
    x = torch.nn.functional.pad(x, (0, columns * stride - total, 0, rows * stride - length))
    tiles = x.unflatten(3, (columns, stride)).unflatten(2, (rows, stride)).transpose(3, 4)  # [.., rows, columns, S, S]
    logits = tiles.flip(-1).diagonal(dim1=-2, dim2=-1).sum(-1)
    last = past + torch.arange(rows)[:, None] * stride + stride - 1
    if causal:
        logits = logits.masked_fill(torch.arange(columns) * stride > last, -math.inf)
    p = (logits / stride).softmax(-1)
    n = block // stride
    rows = [p[:, :, a : a + n].mean(2) for a in range(0, rows, n)]
    blocks = [torch.stack([r[..., b : b + n].sum(-1) for b in range(0, columns, n)], -1) for r in rows]
    return torch.stack(blocks, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", HEADS[1:])
def test_antidiagonal_scores(heads, dtype, causal, monkeypatch):
    monkeypatch.setattr(ops, "_TILE_NUMBERS", 200)  # many chunks of query blocks
    for lengths in LENGTHS:
        q, k = problem(*heads, *lengths, dtype, batch=1)
        for block, stride in ((8, 4), (6, 2), (4, 4)):
            found = ops.antidiagonal_scores(q, k, block, stride, scale=0.5, causal=causal)
            expected = antidiagonal(q, k, block, stride, 0.5, causal)
            if causal:
                seen = first_seen(*lengths, block, block)
                expected = expected.masked_fill(~seen, -math.inf)
                assert torch.allclose(found.masked_fill(~seen, 0.0).sum(-1), torch.ones((), dtype=found.dtype))
            agrees(found, expected, dtype)


def test_antidiagonal_of_constant_blocks_is_the_mass_of_blocks():
    q, k = (x.repeat_interleave(8, 2) for x in problem(2, 2, 5, 5, torch.float64))
    found = ops.antidiagonal_scores(q, k, 8, 4, scale=0.7, causal=False)
    p = (0.7 * q @ k.mT).softmax(-1)
    agrees(found, p.unflatten(3, (-1, 8)).sum(-1).unflatten(2, (-1, 8)).mean(3), torch.float64)


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_window_scores(heads, lengths, dtype, softcap, monkeypatch):
    monkeypatch.setattr(ops, "_TILE_NUMBERS", 300)  # a KV head at a time
    q, k = problem(*heads, *lengths, dtype)
    length, total = lengths
    for last in {1, min(5, length), length}:
        x = 0.4 * q[:, :, -last:].double() @ spread(k, q).mT
        x = x if softcap is None else softcap * (x / softcap).tanh()
        x = x.masked_fill(torch.ones(last, total).tril(total - last) == 0, -math.inf)
        p = x.softmax(-1)
        slash = torch.zeros_like(p[:, :, 0])
        for i in range(last):
            slash[..., : total - last + i + 1] += p[:, :, i, : total - last + i + 1].flip(-1)
        vertical, diagonal = ops.window_scores(q, k, last, scale=0.4, softcap=softcap)
        agrees(vertical, p.sum(2), dtype)
        agrees(diagonal, slash, dtype)


# ---------------------------------------------------------------------- dimensions


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", HEADS)
def test_partial_scores(heads, dtype):
    q, k = problem(*heads, 6, 11, dtype)
    see = torch.ones(6, 11).tril(5) == 1
    for rows in (1, heads[0]):
        dims = torch.stack([torch.randperm(16)[:5] for _ in range(rows)])
        expected = torch.stack([
            q[:, h, :, dims[h % rows]].double() @ spread(k, q)[:, h, :, dims[h % rows]].mT for h in range(heads[0])
        ], 1)  # fmt: skip
        agrees(ops.partial_scores(q, k, dims, causal=False), expected, dtype)
        agrees(ops.partial_scores(q, k, dims, scale=0.5), (expected / 2).masked_fill(~see, -math.inf), dtype)
    every = torch.arange(16)[None]
    agrees(ops.partial_scores(q, k, every, causal=False), q.double() @ spread(k, q).mT, dtype)


# ---------------------------------------------------------------------- refusals


def test_refusals():
    q, k = problem(4, 2, 6, 6)
    row = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    for call, words in (
        (lambda: ops.page_bound(row[0], row[1], row[1][:, :4]), "bounds"),
        (lambda: ops.page_bound(row[0], row[1], row[1], group="median"), "median"),
        (lambda: ops.page_bound(row[0], row[1], row[1], count=torch.ones(3)), "count"),
        (lambda: ops.pooled_scores(q, k, 0, 4, scale=1.0), "size"),
        (lambda: ops.pooled_scores(q, k, 4, 4, scale=1.0, pool="sum"), "pool"),
        (lambda: ops.pooled_scores(q[:, :3], k, 4, 4, scale=1.0), "multiple"),
        (lambda: ops.antidiagonal_scores(q, k, 12, 8, scale=1.0), "stride"),
        (lambda: ops.window_scores(q, k, 7, scale=1.0), "last"),
        (lambda: ops.window_scores(q, k, 0, scale=1.0), "last"),
        (lambda: ops.partial_scores(q, k, torch.tensor([[16]])), "dimensions"),
        (lambda: ops.partial_scores(q, k, torch.zeros(3, 2, dtype=torch.int)), "dims"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_routes_say_why():
    q, k = problem(4, 2, 6, 6)
    for op, args in (
        ("page_bound", (q[:, :, 0], k[:, 0], k[:, 0])),
        ("pooled_scores", (q, k, 2, 2)),
        ("antidiagonal_scores", (q, k, 4, 2)),
        ("window_scores", (q, k, 2)),
    ):
        how = {} if op == "page_bound" else {"scale": 1.0}
        assert which(op, *args, **how) == ("torch", "the tensors are on cpu")

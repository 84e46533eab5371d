"""The indexers' kernels under Triton's interpreter, against scores written out and against the PyTorch path."""

import math

import pytest
import torch

from foveal.ops import index, top

gpu = pytest.importorskip("foveal.ops.gpu.index", reason="needs triton")

DTYPES = [torch.float32, torch.bfloat16]


def drawn(heads, length, total, dim, dtype, weighed, batch=2, whole=True):
    """Whole numbers make every score exact, so that equal scores are equal in any order of addition."""
    g = torch.Generator().manual_seed(heads + length)
    made = lambda *shape: torch.randn(shape, generator=g)
    q, w, k = made(batch, length, heads, dim), made(batch, length, heads), made(batch, total, dim)
    q, w, k = ((x * 1.5).round() if whole else x for x in (q, w, k))
    return q.to(dtype).transpose(1, 2), w.to(dtype).transpose(1, 2) if weighed else None, k.to(dtype)


def best_of(scores, budget):
    """Of pairs (score, token), the best in ascending order; of equal scores the earlier token."""
    return sorted(t for _, t in sorted(scores, key=lambda x: (-x[0], x[1]))[:budget])


def written_out(q, w, k, budget, relu, size, block=None, blocks=None):
    batch, length, total = q.shape[0], q.shape[2], k.shape[1]
    out = torch.full((batch, -(-length // size), budget), -1, dtype=torch.int32)
    for b in range(batch):
        z = q[b].double() @ k[b].double().T
        z = z.clamp(min=0) if relu else z
        token = (z if w is None else z * w[b].double()[..., None]).sum(0).tolist()
        if block:
            mean = torch.stack([x.double().mean(0) for x in k[b].split(block)]).to(k.dtype)
            z = q[b].double() @ mean.double().T
            z = z.clamp(min=0) if relu else z
            page = (z if w is None else z * w[b].double()[..., None]).sum(0)
        for a in range(out.shape[1]):
            rows = range(a * size, min((a + 1) * size, length))
            at = [i + total - length for i in rows]
            seen = range(at[-1] + 1)
            if block:
                own = range(at[0] // block, at[-1] // block + 1)
                rank = [(math.inf if j == 0 or j in own else page[rows, j].max().item(), j) for j in range(own[-1] + 1)]
                seen = [t for t in seen if t // block in best_of(rank, blocks)]
            value = lambda t, token=token, rows=rows, at=at: max(
                token[i][t] for i, p in zip(rows, at, strict=True) if p >= t
            )
            found = best_of([(value(t), t) for t in seen], budget)
            out[b, a, : len(found)] = torch.tensor(found, dtype=torch.int32)
    return out


CASES = [  # heads, queries, tokens, head size; budget, block, blocks; queries of a run
    (3, 10, 10, 16, 3, 2, 3, 1),
    (7, 3, 50, 24, 12, 8, 4, 1),
    (9, 1, 33, 16, 6, 16, 2, 1),
    (4, 11, 40, 16, 9, 4, 5, 6),  # a last run of fewer queries, runs across blocks
    (1, 15, 15, 24, 6, 2, 4, 3),
    (2, 4, 4, 16, 20, 64, 1, 1),  # one block, and a budget for more than there is
    (2, 10, 45, 16, 7, 3, 9, 5),  # a block that is no power of two
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_indexers(case, relu, dtype):
    """Kernels, PyTorch and scores written out agree to the token, equal scores included."""
    heads, length, total, dim, budget, block, blocks, size = case
    q, w, k = drawn(heads, length, total, dim, dtype, weighed=relu)
    if block & (block - 1):  # a mean that is not exact in few bits depends on how it was added up
        k = k[:, ::block].repeat_interleave(block, 1)[:, :total]
    how = {"relu": relu, "size": size}
    flat = index.index_flat(q, w, k, budget, **how)
    staged = index.index_two_stage(q, w, k, budget, block=block, blocks=blocks, **how)
    assert torch.equal(flat, written_out(q, w, k, budget, **how))
    assert torch.equal(staged, written_out(q, w, k, budget, **how, block=block, blocks=blocks))
    q, w = (q, w) if relu else index._one_head(q, w)
    count = -(-length // size)
    start = min(1, count - 1)
    some = slice(start, count)
    scores = gpu.launch_scores(q, w, k, relu, size, start, count, 0, total)
    assert torch.equal(top.top_slots(scores.flatten(0, 1), budget).unflatten(0, scores.shape[:2]), flat[:, some])
    mean = index.pool_blocks(k[:, None], block)[:, 0].to(k.dtype)
    coarse = gpu.launch_scores(q, w, mean, relu, size, start, count, block, total)
    kept = min(blocks, mean.shape[1])
    chosen = top.top_slots(coarse.flatten(0, 1), kept).unflatten(0, coarse.shape[:2])
    assert torch.equal(gpu.launch_inside(q, w, k, chosen, budget, block, relu, size, start), staged[:, some])


def test_real_numbers_over_several_tiles(monkeypatch):
    """Keys and lists of more than one tile; a scratch of several parts."""
    monkeypatch.setattr(gpu, "EACH", 2)
    q, w, k = drawn(5, 14, 130, 16, torch.float32, True, batch=1, whole=False)
    flat, staged = index.index_flat(q, w, k, 30), index.index_two_stage(q, w, k, 30, block=8, blocks=9)
    scores = gpu.launch_scores(q, w, k, True, 1, 0, 14, 0, 130)
    assert torch.equal(top.top_slots(scores[0], 30), flat[0])
    coarse = gpu.launch_scores(q, w, index.pool_blocks(k[:, None], 8)[:, 0], True, 1, 10, 14, 8, 130)
    chosen = top.top_slots(coarse[0], 9)[None]
    assert torch.equal(gpu.launch_inside(q, w, k, chosen, 30, 8, True, 1, 10), staged[:, 10:])


def test_the_operators_describe_their_results_and_are_taken(monkeypatch):
    q, w, k = drawn(3, 4, 12, 16, torch.float32, True)
    chosen = torch.tensor([0, 2], dtype=torch.int32).expand(2, 2, 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(gpu.index_scores, (q, w, k, True, 2, 0, 2, 0, 12), test_utils=checks)
    torch.library.opcheck(gpu.index_inside, (q, None, k, chosen, 5, 4, True, 2, 0), test_utils=checks)
    calls = [
        lambda: index.index_flat(q, w, k, 5, size=2),
        lambda: index.index_flat(q, w, k, 5, relu=False),
        lambda: index.index_two_stage(q, w, k, 4, block=4, blocks=2, size=2),
        lambda: index.index_two_stage(q, None, k, 4, block=4, blocks=2, relu=False),
    ]
    plain, taken = [call() for call in calls], []
    monkeypatch.setattr(index, "no_kernel", lambda x: taken.append(1))
    for call, expected in zip(calls, plain, strict=True):
        taken.clear()
        assert torch.equal(call(), expected) and taken

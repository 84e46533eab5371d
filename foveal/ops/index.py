"""Indexers: small heads that score every past token so that attention may read the best few (DeepSeek Sparse Attention, HISA).

Queries q are `[batch, index heads, length, dim]`, their weights w `[batch, index heads, length]` (None: 1 each), keys k
`[batch, total, dim]`: all heads of an indexer share one key a token, and the queries are the last `length` of `total` tokens. A score is
I(t, j) = sum_h w[h, t] * ReLU(q[h, t] . k[j]), in float32 (float64 for float64 inputs). `relu=False` leaves the products as they are: the
heads are then one, the weighted sum of their queries in the dtype of q.

A run of `size` queries has one list, by the largest score of a token among its queries that stand at or after it. The larger score wins,
and of equal scores the earlier token. Results are int32 `[batch, ceil(length / size), budget]`, ascending, -1 for none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.dense import wide
from foveal.ops.route import Route, no_kernel, routed
from foveal.ops.scores import _no_half, pool_blocks
from foveal.ops.top import top_slots

COLUMNS = 128  # rows of a list, heads times queries, that a kernel holds
CANDIDATES = 8192  # tokens of the blocks of a list that a kernel holds


@torch.no_grad()
def index_flat(q: Tensor, w: Tensor | None, k: Tensor, budget: int, *, relu: bool = True, size: int = 1) -> Tensor:
    """The `budget` best tokens of each run of queries, its own and those before it, all of them scored, as DeepSeek's indexer does.

    Raises `InputError` for shapes that do not fit and a budget that could leave a query of a run without any token.
    """
    route = _flat_route(q, w, k, budget, relu=relu, size=size)
    q, w = (q, w) if relu else _one_head(q, w)
    token, out = torch.arange(k.shape[1], device=k.device), []
    for some in _runs(q, size, k.shape[1] if route.name == "triton" else k.shape[1] * q.shape[1] * size):
        if route.name == "triton":
            from foveal.ops.gpu import index as gpu

            scores = gpu.index_scores(q, w, k, relu, size, some.start, some.stop, 0, k.shape[1])
        else:
            rows = _rows(q, size, some)
            later = token > (rows + k.shape[1] - q.shape[2])[..., None]
            scores = _scores(q, w, k[:, None], relu, rows).masked_fill(later, -math.inf).amax(2)
        out.append(top_slots(scores.flatten(0, 1), budget).unflatten(0, scores.shape[:2]))
    return torch.cat(out, 1)


@torch.no_grad()
def index_two_stage(
    q: Tensor,
    w: Tensor | None,
    k: Tensor,
    budget: int,
    *,
    block: int = 128,
    blocks: int = 64,
    relu: bool = True,
    size: int = 1,
) -> Tensor:
    """As `index_flat`, but only the tokens of the `blocks` best blocks of `block` tokens are scored (HISA).

    A block's score is that of its mean key, in the dtype of k; the first block and those of the queries themselves are always among them.
    Raises `InputError` also where the blocks cannot hold the budget.
    """
    route = _two_stage_route(q, w, k, budget, block=block, blocks=blocks, relu=relu, size=size)
    mean = pool_blocks(k[:, None], block)[:, 0].to(k.dtype)  # [batch, number of blocks, dim]
    kept = min(blocks, mean.shape[1])
    q, w = (q, w) if relu else _one_head(q, w)
    columns, out = q.shape[1] * size, []
    # A kernel leaves the scores of blocks in memory; plain PyTorch the keys and products of the tokens as well.
    numbers = mean.shape[1] if route.name == "triton" else max(mean.shape[1], kept * block) * max(columns, q.shape[3])
    for some in _runs(q, size, numbers):
        if route.name == "triton":
            from foveal.ops.gpu import index as gpu

            coarse = gpu.index_scores(q, w, mean, relu, size, some.start, some.stop, block, k.shape[1])
            chosen = top_slots(coarse.flatten(0, 1), kept).unflatten(0, coarse.shape[:2])
            out.append(gpu.index_inside(q, w, k, chosen, budget, block, relu, size, some.start))
        else:
            out.append(_inside(q, w, k, mean, budget, block, kept, relu, size, some))
    return torch.cat(out, 1)


@routed("index_flat")
def _flat_route(q, w, k, budget, *, relu=True, size=1) -> Route:
    fits = (
        q.dim() == 4
        and k.dim() == 3
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[2])
        and 1 <= q.shape[2] <= k.shape[1]
    )
    if not fits or (w is not None and w.shape != q.shape[:3]):
        raise InputError(
            "expected q [batch, index heads, length, dim], w [batch, index heads, length] and k [batch, total, dim], got "
            f"{list(q.shape)}, {w if w is None else list(w.shape)} and {list(k.shape)}"
        )
    if not 1 <= size <= budget:
        raise InputError(
            f"expected runs of 1 to {budget} queries, as many as the budget has tokens, got {size}; give a larger budget"
        )
    columns = size * q.shape[1] if relu else size
    why = no_kernel(q) or _no_half(q, k)
    if why is None and (q.shape[3] > 256 or columns > COLUMNS):
        why = f"the kernels take {COLUMNS} heads x queries of size 256 at most, not {columns} of {q.shape[3]}"
    return Route("torch", why) if why else Route("triton", "products, weights and sums in one kernel")


@routed("index_two_stage")
def _two_stage_route(q, w, k, budget, *, block=128, blocks=64, relu=True, size=1) -> Route:
    route = _flat_route(q, w, k, budget, relu=relu, size=size)
    if min(block, blocks) < 1 or block * blocks < budget:
        raise InputError(
            f"expected blocks x block >= the budget of {budget} tokens, got {blocks} x {block}: give more or larger blocks"
        )
    if route.name == "triton" and min(blocks * block, k.shape[1] + block) > CANDIDATES:
        return Route(
            "torch", f"the kernel scores {CANDIDATES} tokens of a list at most, not {blocks} blocks of {block}"
        )
    return route


def _one_head(q: Tensor, w: Tensor | None) -> tuple[Tensor, None]:
    """Without a ReLU the weighted sum of products is the product with the weighted sum of queries."""
    if w is None and q.shape[1] == 1:
        return q, None
    x = q.to(wide(q.dtype))
    x = x if w is None else x * w[..., None]
    return x.sum(1, keepdim=True).to(q.dtype), None


def _runs(q: Tensor, size: int, numbers: int) -> Iterator[range]:
    """Runs of queries that make `numbers` numbers each, so many at a time as stay within the memory of a tile."""
    step = max(1, (1 << 20 if q.is_cpu else 1 << 28) // max(1, numbers * q.shape[0]))
    count = -(-q.shape[2] // size)
    return (range(start, min(start + step, count)) for start in range(0, count, step))


def _rows(q: Tensor, size: int, some: range) -> Tensor:
    """The queries of some runs, [runs, size]; the last is repeated beyond the text, which changes no maximum."""
    return torch.arange(some.start * size, some.stop * size, device=q.device).view(-1, size).clamp(max=q.shape[2] - 1)


def _scores(q: Tensor, w: Tensor | None, keys: Tensor, relu: bool, rows: Tensor) -> Tensor:
    """Scores [batch, runs, size, n] of the queries `rows` [runs, size] with keys [batch, runs or 1, n, dim]."""
    dtype = wide(q.dtype)
    heads = q[:, :, rows].to(dtype).permute(0, 2, 3, 1, 4)  # [batch, runs, size, heads, dim]
    z = (heads.flatten(2, 3) @ keys.to(dtype).mT).unflatten(2, heads.shape[2:4])
    z = z.relu_() if relu else z
    return z.sum(3) if w is None else (w[:, :, rows].to(dtype).permute(0, 2, 3, 1)[..., None, :] @ z)[..., 0, :]


def _inside(
    q: Tensor,
    w: Tensor | None,
    k: Tensor,
    mean: Tensor,
    budget: int,
    block: int,
    kept: int,
    relu: bool,
    size: int,
    some: range,
) -> Tensor:
    """Both stages for some runs."""
    rows, number = _rows(q, size, some), mean.shape[1]
    position = rows + k.shape[1] - q.shape[2]
    own, last = (position[:, i, None] // block for i in (0, -1))  # [runs, 1]
    column = torch.arange(number, device=k.device)
    coarse = _scores(q, w, mean[:, None], relu, rows).amax(2)
    coarse = coarse.masked_fill((column == 0) | (column >= own), math.inf).masked_fill(column > last, -math.inf)
    chosen = (
        top_slots(coarse.flatten(0, 1), kept).long().unflatten(0, coarse.shape[:2])[..., None]
    )  # [batch, runs, kept, 1]
    token = chosen * block + torch.arange(block, device=k.device)
    token = token.where((chosen >= 0) & (token < k.shape[1]), -1).flatten(2)
    batch = torch.arange(k.shape[0], device=k.device)[:, None, None]
    scores = _scores(q, w, k[batch, token.clamp(min=0)], relu, rows)
    hidden = (token < 0)[:, :, None] | (token[:, :, None] > position[..., None])
    scores = scores.masked_fill(hidden, -math.inf).amax(2)
    best = top_slots(scores.flatten(0, 1), budget).long().unflatten(0, scores.shape[:2])
    return token.gather(2, best.clamp(min=0)).where(best >= 0, -1).int()

"""Search by halving: the best blocks of keys for each block of queries, of which only a logarithm is ever scored (HiP).

Groups of blocks stand in the order of the text. The larger score wins, and of equal scores the earlier group. What is found carries no
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.dense import check, wide
from foveal.ops.route import Route, no_kernel, routed
from foveal.ops.scores import _no_half
from foveal.ops.top import largest

REPRESENTATIVES = ("first", "middle", "random")
_TILE_NUMBERS = 1 << 21  # keys copied and logits made at a time on a CPU: 8 MB in float32


@torch.no_grad()
def tree_search(
    q: Tensor,
    k: Tensor,
    wanted: int,
    *,
    query_block: int,
    key_block: int,
    sink: int = 0,
    recent: int = 1,
    representative: str = "first",
    stride: int = 1,
) -> Tensor:
    """Tokens of the `wanted` best blocks of `key_block` keys that a binary search finds for each run of `query_block` queries.

    Queries `[batch, heads, length, head_dim]` are the last of the keys `[batch, kv_heads, total, head_dim]`. A run whose first query
    stands at position p searches the tokens sink .. p - recent, of which the last block may have fewer. The search begins with as many
    equal groups of blocks as are wanted, halves each, scores each half by the largest q . k (in float32) among the tokens of the block
    that stands for it, its "first", "middle" or a "random" one, and every `stride`-th query of the run in all heads that share the keys,
    keeps the best halves, and goes on until groups are single blocks (HiP, algorithm 1).

    Returns int32 `[batch, kv_heads, ceil(length / query_block), wanted * key_block]`, ascending, -1 for none.
    Raises `InputError` for shapes that do not fit, sizes below 1 and other words.
    """
    sizes = {"query_block": query_block, "key_block": key_block, "sink": sink, "recent": recent}
    how = {"representative": representative, "stride": stride}
    if _route(q, k, wanted, **sizes, **how).name == "triton":
        from foveal.ops.gpu import tree as gpu

        kind = REPRESENTATIVES.index(representative)
        return gpu.tree_search(q, k, wanted, query_block, key_block, sink, recent, kind, stride)
    first = torch.arange(0, q.shape[2], query_block, device=q.device)  # of each run, its first query
    if not len(first):
        return torch.empty(q.shape[0], k.shape[1], 0, wanted * key_block, dtype=torch.int32, device=q.device)
    rows = q.shape[1] // k.shape[1] * -(-query_block // stride)
    numbers = 2 * wanted * key_block * q.shape[0] * k.shape[1] * (q.shape[3] + rows)
    few = max(1, (_TILE_NUMBERS if q.is_cpu else 1 << 27) // numbers)
    return torch.cat([_search(q, k, some, wanted, **sizes, **how) for some in first.split(few)], 2)


@routed("tree_search")
def _route(q, k, wanted, *, query_block, key_block, sink=0, recent=1, representative="first", stride=1) -> Route:
    check(q, k, None)
    least = {"wanted": wanted, "query_block": query_block, "key_block": key_block, "stride": stride, "recent": recent}
    for name, number in least.items():
        if number < 1:
            raise InputError(f"expected {name} of at least 1, got {number}")
    if sink < 0 or representative not in REPRESENTATIVES:
        raise InputError(
            f"expected sink from 0 up and representative one of {', '.join(REPRESENTATIVES)}, got {sink} and '{representative}'"
        )
    why = no_kernel(q) or _no_half(q, k)
    if why is None and (q.shape[3] > 256 or wanted > 2048 or key_block > 128):
        why = (
            f"the kernel finds 2048 blocks of 128 keys of size 256 at most, not {wanted} of {key_block} of {q.shape[3]}"
        )
    return Route("torch", why) if why else Route("triton", "the whole search of a run of queries in one program")


def _search(
    q: Tensor, k: Tensor, first: Tensor, wanted: int, query_block, key_block, sink, recent, representative, stride
) -> Tensor:
    """What is found for the runs that begin at the queries `first` [n]: [batch, kv_heads, n, wanted * key_block]."""
    (batch, kv_heads, total), length = k.shape[:3], q.shape[2]
    newest = first + total - length
    rows = (first[:, None] + torch.arange(0, query_block, stride, device=q.device)).clamp(max=length - 1)
    x = (
        q[:, :, rows].unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(3, 4)
    )  # [batch, kv_heads, n, group * rows, head_dim]
    x = x.to(wide(q.dtype))
    lists = torch.arange(batch * kv_heads, device=q.device).view(batch, kv_heads, 1, 1)
    keys = k.flatten(0, 1)

    def score(blocks: Tensor) -> Tensor:
        ids = block_tokens(blocks, newest, key_block, sink, recent)
        best = (x @ keys[lists, ids.clamp(min=0)].to(x.dtype).mT).amax(3).masked_fill(ids < 0, -math.inf)
        return best.unflatten(-1, (-1, key_block)).amax(-1)

    count = searched_blocks(newest, key_block, sink, recent).expand(batch, kv_heads, -1)
    found = halve(count, wanted, wanted, -(-total // key_block), score, representative)
    return block_tokens(found, newest, key_block, sink, recent).int()


def searched_blocks(newest: Tensor, key_block: int, sink: int, recent: int) -> Tensor:
    """Blocks between the sinks and the window of queries [..] whose token ids are `newest`; the last may reach into the window."""
    return -(-(newest + 1 - recent - sink).clamp(min=0) // key_block)


def block_tokens(blocks: Tensor, newest: Tensor, key_block: int, sink: int, recent: int) -> Tensor:
    """Token ids of the blocks [.., n], [.., n * key_block]; -1 from the window of the query on, and for block -1."""
    ids = sink + blocks[..., None] * key_block + torch.arange(key_block, device=blocks.device)
    outside = (blocks < 0)[..., None] | (ids > (newest - recent)[..., None, None])
    return ids.masked_fill(outside, -1).flatten(-2)


def halve(
    count: Tensor,
    wanted: int | Tensor,
    width: int,
    most: int,
    score: Callable[[Tensor], Tensor],
    representative: str = "first",
) -> Tensor:
    """The blocks a binary search finds among 0 .. count - 1, ascending [.., width], -1 where fewer are wanted or there are.

    count: [..], at most `most`.  wanted: how many for each list, [..] or a number, at most `width`.  score(blocks [.., n]) -> [.., n],
    where block -1 is none.
    """
    allowed = wanted[..., None] if isinstance(wanted, Tensor) else wanted
    groups = count[..., None].clamp(max=allowed)  # none is empty
    place = torch.arange(width, device=count.device)
    left, right = (count[..., None] * (place + i).clamp(max=groups) // groups.clamp(min=1) for i in (0, 1))
    fewest = wanted if isinstance(wanted, int) else 1
    for _ in range(math.ceil(math.log2(max(1, -(-most // fewest))))):
        middle = (left + right) // 2
        low, high = torch.stack([left, middle], -1).flatten(-2), torch.stack([middle, right], -1).flatten(-2)
        empty = low >= high
        z = score(_picked(low, high, representative).where(~empty, -1))
        z = z.clamp(min=torch.finfo(z.dtype).min).masked_fill(empty, -math.inf)
        kept = largest(z, wanted) & ~empty
        rank = torch.where(kept, kept.cumsum(-1) - 1, width)
        left, right = (x.new_zeros(*x.shape[:-1], width + 1).scatter_(-1, rank, x)[..., :width] for x in (low, high))
    return left.masked_fill(left >= right, -1)


def _picked(low: Tensor, high: Tensor, representative: str) -> Tensor:
    """The block that stands for low .. high - 1."""
    if representative == "first":
        return low
    if representative == "middle":
        return (low + high) // 2
    mixed = ((low * 2654435761 + high * 40503) >> 7).abs()  # drawn anew for every group, the same for every run
    return low + mixed % (high - low).clamp(min=1)

"""Prefill over a list of key blocks by PyTorch: the listed keys are gathered, rows with equally many blocks at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.ops.dense import HIDDEN, Prepared, exact, fused, wide

_GATHERED_NUMBERS = 1 << 21  # keys copied at a time: 8 MB in float32, so that the kernel still finds them in the cache


def by_torch(
    p: Prepared, block_map: Tensor, query_block: int, key_block: int, starts: Tensor | None, need_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, log-sum-exp and, where it is needed, entropy of causal attention over a map's blocks; arguments as in `attend_blocks`."""
    if need_entropy:
        # The mean logit of a row is q . (sum of p k): keys that ride along as values give it without the weights.
        q, k = (t.detach().to(wide(p.q.dtype)) for t in (p.q, p.k))
        keyed = Prepared(q, k, k, p.scale, None, p.split, exact=False)
        keys, lse, _ = by_torch(keyed, block_map, query_block, key_block, starts, False)
        entropy = (lse - (q * keys).sum(-1) * p.scale).masked_fill(lse < HIDDEN / 2, 0.0)
    else:
        entropy = None
    if starts is None:
        out, lse = _run(p, *_square(block_map, p, query_block, key_block))
    else:
        out, lse = exact(p, causal=True, mask=_packed(p, block_map, query_block, key_block, starts))
    return out, lse, entropy


def _square(block_map: Tensor, p: Prepared, query_block: int, key_block: int) -> tuple[Tensor, int]:
    """The same map in blocks as wide as they are high."""
    size = math.gcd(query_block, key_block)
    if query_block == key_block:
        return block_map, size
    fine = block_map.repeat_interleave(query_block // size, 2).repeat_interleave(key_block // size, 3)
    return fine[:, :, : -(-p.q.shape[2] // size), : -(-p.k.shape[2] // size)], size


def _packed(p: Prepared, block_map: Tensor, query_block: int, key_block: int, starts: Tensor):
    """Visibility of packed sequences, tile by tile, as `exact` asks for it."""
    length, total = p.q.shape[2], p.k.shape[2]
    position = torch.arange(total, device=starts.device)
    number = torch.searchsorted(starts.to(position.dtype), position, right=True)

    def visible(start: int, stop: int) -> Tensor:
        rows = torch.arange(start, stop, device=starts.device)
        seen = block_map[:, :, rows // query_block].repeat_interleave(key_block, 3)[..., :total]
        return seen & (number[total - length + rows, None] == number)

    return visible


def _run(p: Prepared, block_map: Tensor, size: int) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = p.q.shape
    kv_heads, total = p.k.shape[1:3]
    nq, nk = block_map.shape[2:]
    by_kv = block_map.unflatten(1, (kv_heads, -1))
    # Query heads of one KV head that ask for the same blocks share one gathered copy of them.
    together = heads // kv_heads if bool((by_kv == by_kv[:, :, :1]).all()) else 1
    lists = heads // together
    live, first = _live(block_map[:, ::together], size, total - length)
    # One row for each (batch, head or KV head, query block).
    rows = _pad_length(p.q, nq * size).unflatten(1, (lists, together)).unflatten(3, (nq, size))
    rows = rows.transpose(2, 3).flatten(0, 2)
    k, v = (_pad_length(t, nk * size).unflatten(2, (nk, size)).flatten(0, 2) for t in (p.k, p.v))
    row_kv = torch.arange(batch * lists, device=k.device) // (lists // kv_heads)
    row_kv = row_kv.repeat_interleave(nq)
    out = p.q.new_zeros(*rows.shape[:3], v.shape[-1])
    lse = p.q.new_full(rows.shape[:3], HIDDEN, dtype=wide(p.q.dtype))
    for members, mask in _equal_rows(live, first, size, (total - length) % size, rows.shape[-1]):
        count = mask.shape[-1] // size
        chosen = live[members].nonzero()[:, 1].view(-1, count) + row_kv[members, None] * nk
        keys, values = (t[chosen.flatten()].view(len(members), 1, count * size, -1) for t in (k, v))
        out_rows, lse_rows = fused(p.replace(rows[members], keys, values), causal=False, mask=mask)
        out[members], lse[members] = out_rows.to(out.dtype), lse_rows
    out, lse = (t.unflatten(0, (batch, lists, nq)).transpose(2, 3).flatten(3, 4).flatten(1, 2) for t in (out, lse))
    return out[:, :, :length], lse[:, :, :length]


def _live(block_map: Tensor, size: int, past: int) -> tuple[Tensor, Tensor]:
    """Chosen blocks that causality leaves, bool `[rows, nk]`, and each row's first block that it cuts, `[rows]`."""
    batch, lists, nq, nk = block_map.shape
    first = (past + torch.arange(nq, device=block_map.device) * size) // size
    last = (past + torch.arange(1, nq + 1, device=block_map.device) * size - 1) // size
    live = block_map & (torch.arange(nk, device=block_map.device) <= last[:, None])
    return live.flatten(0, 2), first.repeat(batch * lists)


def _equal_rows(live: Tensor, first: Tensor, size: int, shift: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, mask): rows with equally many blocks cut alike by causality, so that no list needs padding."""
    nk = live.shape[1]
    cut = live.gather(1, first[:, None])[:, 0].long()
    if shift:  # queries and keys are not aligned in blocks: the diagonal crosses two of them
        after = (first + 1).clamp(max=nk - 1)
        cut += 2 * (live.gather(1, after[:, None])[:, 0] & (first + 1 < nk))
    kind = live.sum(-1) * 4 + cut
    order = kind.argsort(stable=True)
    kinds, sizes = kind[order].unique_consecutive(return_counts=True)
    for code, members in zip(kinds.tolist(), order.split(sizes.tolist()), strict=True):
        count, cuts = divmod(code, 4)
        if count:
            mask = _mask(count, [n for n in (0, 1) if cuts >> n & 1], size, shift, live.device)
            for some in members.split(max(1, _GATHERED_NUMBERS // (count * size * width))):
                yield some, mask


def _mask(count: int, cuts: list[int], size: int, shift: int, device) -> Tensor:
    """Mask `[size, count * size]`: the last blocks of the list are those that the diagonal cuts."""
    mask = torch.zeros(size, count * size, device=device)
    row, column = torch.arange(size, device=device)[:, None], torch.arange(size, device=device)[None]
    for place, n in enumerate(cuts, count - len(cuts)):
        mask[:, place * size : (place + 1) * size].masked_fill_(column + n * size > row + shift, HIDDEN)
    return mask


def _pad_length(t: Tensor, length: int) -> Tensor:
    return t if t.shape[2] == length else F.pad(t, (0, 0, 0, length - t.shape[2]))

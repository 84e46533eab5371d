"""Prefill over a list of key blocks per head and query block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.block_lists import BlockLists
from foveal.ops.dense import HIDDEN, Prepared, check, exact, finish, fused, prepare, wants_grad, wide
from foveal.ops.route import Route, hopper, no_kernel, routed

_MOST_COLUMNS = 32  # of a bias in bfloat16: what fits beside keys and values in the kernels' shared memory
_GATHERED_NUMBERS = 1 << 21  # keys copied at a time: 8 MB in float32, so that the kernel still finds them in the cache


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor | BlockLists,
    size: int | tuple[int, int] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    mass: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    need_lse: bool = False,
    need_entropy: bool = False,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Attention over chosen key blocks; cost is proportional to their number.

    `block_map` is bool `[batch, heads, ceil(length / size), ceil(total / size)]`: whether the queries
    a*size..(a+1)*size see the keys b*size..(b+1)*size, as far as causality lets them; `size` is a number of tokens, or
    (query_block, key_block). Or it is a `BlockLists`, which knows its sizes. Last blocks may be partial. `causal=False`: they see
    all of them, and queries may be more than keys.
    `starts`: int32 `[n + 1]`, bounds of n sequences packed into a batch of 1; keys of other sequences are never visible.
    `need_entropy`: also return, third, the entropy of each row in nats, float32 `[batch, heads, length]`, without gradient.
    Shapes and other keywords: see `foveal.ops.dense`. Raises `InputError` for a map of another shape or dtype.
    """
    check(q, k, v, sinks=sinks, bias=bias, mass=mass, causal=causal)
    lists = _check_lists(q, k, block_map, size)
    _check_rest(q, k, scale, softcap, starts, need_entropy, causal)
    route = _choose(q, k, v, block_map, size, scale=scale, softcap=softcap, bias=bias, mass=mass, causal=causal)
    if not causal:
        k, v, bias, mass = _whole_blocks(k, v, bias, mass, _sizes(size)[1] if lists is None else lists.key_block)
        if route.name == "torch" or wants_grad(q, k, v):  # these know the causal order only
            causal = True
            k, v, bias, mass = _longer(k, v, bias, mass, q.shape[2])
            if lists is None:
                block_map = F.pad(block_map, (0, -(-k.shape[2] // _sizes(size)[1]) - block_map.shape[3]))
    if route.name != "torch":
        if lists is None:
            lists = BlockLists.of(block_map, *_sizes(size))
        how = {"gluon": route.name == "gluon", "causal": causal, "bias": bias, "mass": mass}
        out, lse, entropy = _by_kernel(q, k, v, lists, scale, starts, need_entropy, **how)
    else:
        p = prepare(q, k, v, scale=scale, softcap=softcap, bias=bias, mass=mass, differentiable=(q, k, v, sinks))
        if lists is not None:
            block_map = lists.map(-(-k.shape[2] // lists.key_block))
        query_block, key_block = _sizes(size) if lists is None else (lists.query_block, lists.key_block)
        out, lse, entropy = _by_torch(p, block_map, query_block, key_block, starts, need_entropy)
    if need_entropy:
        entropy = _with_sinks(entropy.detach(), lse.detach(), sinks)
    out, lse = finish(out, lse, q, sinks=sinks, holes=route.name == "torch", need_lse=need_lse)
    return (out, lse, entropy) if need_entropy else (out, lse)


def attend_band_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sink: Sequence[int],
    recent: Sequence[int],
    scale: float,
    sinks: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    mass: Tensor | None = None,
    need_lse: bool = False,
    need_entropy: bool = False,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """`attend_band` by the block kernels, exact to the token: each head with its own sinks and window.

    For problems that `kernel_misfit` lets through. sink, recent: tokens for each query head.
    """
    heads, total = q.shape[1], k.shape[2]
    on_hopper = _gluon_misfit(q, 128, 128) is None
    every = all(s + r >= total for s, r in zip(sink, recent, strict=True))
    cut = (tuple([0] * heads), tuple([total] * heads)) if every else (tuple(sink), tuple(recent))
    lists, bounds = (_whole if every else _band)(q.shape[2], total, *cut, heads, q.shape[0], q.device)
    bounds = () if every else bounds
    how = {"gluon": on_hopper, "bias": bias, "mass": mass}
    out, lse, entropy = _by_kernel(q, k, v, lists, scale, None, need_entropy, *bounds, **how)
    if need_entropy:
        entropy = _with_sinks(entropy, lse.detach(), sinks)
    out, lse = finish(out, lse, q, sinks=sinks, holes=False, need_lse=need_lse)
    return (out, lse, entropy) if need_entropy else (out, lse)


def _band_lists(length, total, sink, recent, heads, batch, device) -> tuple[BlockLists, Tensor]:
    """The lists of a band and its bounds [2, heads]; kept, because every layer of a prompt asks for the same."""
    lists = BlockLists.band(length, total, sink, recent, 128, heads, batch=batch, device=device)
    return lists, torch.tensor([sink, recent], device=device).clamp(max=total).to(torch.int32)


_band, _whole = lru_cache(maxsize=4)(_band_lists), lru_cache(maxsize=1)(_band_lists)


# ---------------------------------------------------------------------- routes and checks


def kernel_misfit(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap=None, bias=None, mass=None) -> str | None:
    """Why the block kernels cannot compute this; None if they can."""
    if (why := no_kernel(q)) is not None:
        return why
    if softcap is not None:
        return "the kernels know no soft-cap"
    if bias is not None or mass is not None:
        from .gpu.bias import count

        if count(bias, mass) > _MOST_COLUMNS:
            return f"a bias of rank {bias[0].shape[3]} takes more than {_MOST_COLUMNS} columns"
        if wants_grad(q, k, v, *(bias or ()), mass):
            return "the kernels' backward pass knows neither bias nor mass"
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"the kernels take float16 or bfloat16, not {q.dtype}"
    if q.shape[3] > 256 or q.shape[3] % 8:
        return f"head size {q.shape[3]} is not a multiple of 8 up to 256"
    if v.shape[3] != q.shape[3]:
        return f"values have {v.shape[3]} columns and queries {q.shape[3]}"
    if scale <= 0:
        return f"the scale {scale} is not positive"
    return None


@routed("attend_blocks")
def _choose(
    q, k, v, block_map, size=None, *, scale, softcap=None, sinks=None, bias=None, mass=None, starts=None, causal=True,
    need_lse=False, need_entropy=False,
) -> Route:  # fmt: skip
    given = isinstance(block_map, BlockLists)
    query_block, key_block = (block_map.query_block, block_map.key_block) if given else _sizes(size)
    if not causal and mass is None and k.shape[2] % key_block:
        mass = k[..., 0]  # what fills a last block counts nothing
    why = kernel_misfit(q, k, v, scale=scale, softcap=softcap, bias=bias, mass=mass)
    if why is not None:
        return Route("torch", why)
    if query_block % 16 or key_block % 16:
        return Route("torch", f"blocks of {query_block} x {key_block} are not multiples of 16 x 16")
    why = _gluon_misfit(q, query_block, key_block)
    if why is not None:
        return Route("triton", why)
    return Route("gluon", f"a Hopper GPU, head size {q.shape[3]} and blocks of {query_block} x {key_block}")


def _gluon_misfit(q: Tensor, query_block: int, key_block: int) -> str | None:
    if not hopper(q):
        return "the GPU is not a Hopper"
    from foveal.ops.gpu.blocks_hopper import misfit

    return misfit(q.shape[3], query_block, key_block)


def _sizes(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _check_lists(q: Tensor, k: Tensor, block_map: Tensor | BlockLists, size) -> BlockLists | None:
    """The lists, if that is what was given; raises `InputError` unless the map or the lists fit."""
    batch, heads, length, _ = q.shape
    total = k.shape[2]
    if isinstance(block_map, BlockLists):
        sizes = block_map.query_block, block_map.key_block
        if size is not None and _sizes(size) != sizes:
            raise InputError(f"expected no size beside lists of blocks of {sizes}, got {size}; leave it out")
    elif size is None:
        raise InputError("expected the size of the map's blocks in tokens, got none; pass size")
    else:
        sizes = _sizes(size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise InputError(f"expected a block size of at least 1 token, got {size or sizes}")
    rows, columns = -(-length // sizes[0]), -(-total // sizes[1])
    if isinstance(block_map, BlockLists):
        _check_tables(block_map, (batch, heads, rows), columns)
    elif block_map.dtype != torch.bool or block_map.shape != (batch, heads, rows, columns):
        raise InputError(
            f"expected a bool block map {[batch, heads, rows, columns]} for blocks of {size}, "
            f"got {block_map.dtype} {list(block_map.shape)}; rebuild it for this prompt"
        )
    device = (block_map.counts if isinstance(block_map, BlockLists) else block_map).device
    if device != q.device:
        raise InputError(f"expected the blocks on {q.device}, where the queries are, got {device}; move them")
    return block_map if isinstance(block_map, BlockLists) else None


def _check_tables(lists: BlockLists, rows: tuple[int, int, int], columns: int) -> None:
    counts, indices = lists.counts, lists.indices
    if counts.shape != rows or indices.shape[:3] != rows or indices.dim() != 4:
        raise InputError(
            f"expected counts {list(rows)} and indices {list(rows)} x width, "
            f"got {list(counts.shape)} and {list(indices.shape)}; rebuild the lists for this prompt"
        )
    if counts.dtype != torch.int32 or indices.dtype != torch.int32:
        raise InputError(f"expected int32 lists, got {counts.dtype} and {indices.dtype}; convert them")
    if counts.is_cpu:  # elsewhere looking would wait for the device; the kernels skip what is out of range
        place = torch.arange(indices.shape[3])
        listed = place < counts[..., None]
        wrong = listed & ((indices < 0) | (indices >= columns))
        falling = listed[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
        if bool((counts > indices.shape[3]).any() | wrong.any() | falling.any()):
            raise InputError(f"expected ascending block numbers below {columns}, got others; sort and clip the lists")


def _check_rest(q: Tensor, k: Tensor, scale: float, softcap: float | None, starts, need_entropy, causal) -> None:
    if starts is not None and not causal:
        raise InputError("expected packed sequences in causal order, got causal=False; hide their keys by the map")
    if not math.isfinite(scale):
        raise InputError(f"expected a finite scale, got {scale}; 1 / sqrt(head_dim) is usual")
    if need_entropy and softcap is not None:
        raise InputError("expected no softcap where the entropy is wanted; ask attention_stats for it")
    if starts is None:
        return
    if q.shape[0] != 1 or starts.dim() != 1 or starts.is_floating_point() or starts.device != q.device:
        raise InputError(
            f"expected starts as integers [sequences + 1] on {q.device} and a batch of 1, "
            f"got {starts.dtype} {list(starts.shape)} on {starts.device} and {q.shape[0]}; pack the batch first"
        )
    total = k.shape[2]
    if starts.is_cpu and (starts[0] != 0 or starts[-1] != total or bool((starts.diff() < 0).any())):
        raise InputError(f"expected starts to rise from 0 to {total}, got {starts.tolist()}; cumulate the lengths")


# ---------------------------------------------------------------------- by kernels, and by PyTorch


def _by_kernel(
    q,
    k,
    v,
    lists: BlockLists,
    scale,
    starts,
    need_entropy,
    sink=None,
    recent=None,
    *,
    gluon,
    causal=True,
    bias=None,
    mass=None,
) -> tuple[Tensor, Tensor, Tensor]:
    from foveal.ops.gpu import bias as gpu_bias
    from foveal.ops.gpu import blocks_op

    counts, indices = lists.counts.contiguous(), lists.indices.contiguous()
    phi = (None, None)
    if bias is not None or mass is not None:
        phi = gpu_bias.columns(q, bias, mass, scale=scale, multiple=16)
    return blocks_op.attend_blocks(
        q, k, v, counts, indices, starts, sink, recent, *phi, lists.query_block, lists.key_block, scale, need_entropy, gluon,
        causal,
    )  # fmt: skip


def _whole_blocks(k: Tensor, v: Tensor, bias, mass: Tensor | None, key_block: int):
    """Keys, values, bias and masses up to the end of the last block; what is added counts nothing."""
    room = -k.shape[2] % key_block
    if room and mass is None:
        mass = torch.ones(*k.shape[:3], dtype=wide(k.dtype), device=k.device)
    return _longer(k, v, bias, mass, room)


def _longer(k: Tensor, v: Tensor, bias, mass: Tensor | None, room: int):
    """The same with so many keys more that no block lists or that count nothing."""
    if not room:
        return k, v, bias, mass
    k, v = (F.pad(t, (0, 0, 0, room)) for t in (k, v))
    bias = bias and (bias[0], F.pad(bias[1], (0, 0, 0, room)))
    return k, v, bias, None if mass is None else F.pad(mass, (0, room))


def _with_sinks(entropy: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Entropy over the keys once sinks have joined the denominator: every weight shrinks by the same factor."""
    if sinks is None:
        return entropy
    share = torch.sigmoid(lse - sinks.detach().to(lse.dtype)[None, :, None])
    return share * entropy - torch.special.xlogy(share, share)


def _by_torch(
    p: Prepared, block_map: Tensor, query_block: int, key_block: int, starts: Tensor | None, need_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    if need_entropy:
        # The mean logit of a row is q . (sum of p k): keys that ride along as values give it without the weights.
        q, k = (t.detach().to(wide(p.q.dtype)) for t in (p.q, p.k))
        keyed = Prepared(q, k, k, p.scale, None, p.split, exact=False)
        keys, lse, _ = _by_torch(keyed, block_map, query_block, key_block, starts, False)
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

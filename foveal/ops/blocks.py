"""Prefill over a list of key blocks per head and query block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.block_lists import BlockLists
from foveal.ops.blocks_torch import by_torch
from foveal.ops.dense import check, finish, prepare, wants_grad, wide
from foveal.ops.route import Route, hopper, no_kernel, routed

_MOST_COLUMNS = 32  # of a bias in bfloat16: what fits beside keys and values in the kernels' shared memory


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
        out, lse, entropy = by_torch(p, block_map, query_block, key_block, starts, need_entropy)
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
    kept = _short if q.shape[2] * total <= _SHORT else _whole if every else _band
    lists, bounds = kept(q.shape[2], total, *cut, heads, q.shape[0], q.device)
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
# Those of a batch whose sequences are read one after the other in every layer, where they are small.
_SHORT, _short = 1 << 23, lru_cache(maxsize=128)(_band_lists)


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


# ---------------------------------------------------------------------- by kernels


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

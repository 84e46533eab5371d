"""Attention over per-head lists of key blocks in plain Triton: forward with log-sum-exp and entropy.

One program computes one tile of queries: it walks the tile's list twice, first the key tiles that every row sees in full, then
the few that causality, a packed sequence or a band cuts. Two programs share a multiprocessor, so that one exponentiates while
the other multiplies. Shapes are `[batch, heads, length, head_dim]`; keys and values have as many columns as queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from foveal.ops.gpu import lists
from foveal.ops.gpu.launch import LOG2E
from foveal.ops.gpu.lists import ITEM, Window
from foveal.ops.gpu.variants import Variant

_LN2 = tl.constexpr(0.6931471805599453)
# A hidden logit is finite, so that 0 * logit is 0 and not NaN, and lies so far below the first maximum that exp2 gives 0.
_HIDDEN = tl.constexpr(-3.0e38)
_LOWEST = tl.constexpr(-1.0e30)


class Tiles(NamedTuple):
    """How a kernel is launched: rows of a tile, list keys (or queries) of a step, warps, pipeline stages, most registers."""

    rows: int
    step: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """For the launch and for the compiler."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found if self.registers is None else found | {"maxnreg": self.registers}


@triton.jit
def visible(position, key, first, sink, recent, PACKED: tl.constexpr, BAND: tl.constexpr):
    """Which keys the queries at these positions see; the shapes broadcast."""
    see = position >= key
    if PACKED:
        see = see & (key >= first)
    if BAND:
        see = see & ((key < sink) | (position - key < recent))
    return see


@triton.jit
def within(at, low, high):
    """Whether coordinates lie between bounds, which count; the shapes broadcast."""
    return (at >= low) & (at <= high)


@triton.jit
def list_start(INDICES, place, row, width, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """First key (or query) of the list's tile number `place`."""
    PARTS: tl.constexpr = BLOCK // STEP
    if PARTS == 1:
        return tl.load(INDICES + row * width + place) * BLOCK
    return tl.load(INDICES + row * width + place // PARTS) * BLOCK + (place % PARTS) * STEP


@triton.jit
def _absorb(
    q, K, V, phi, PK, AT, batch, kv_head, phi_head, start, keys, acc, top, mass, heat, factor, position, first, sink, recent,
    lo0, hi0, lo1, hi1, lo2, hi2,
    MASK: tl.constexpr, PACKED: tl.constexpr, BAND: tl.constexpr, AXES: tl.constexpr, ENTROPY: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax: weighted values, maximum, sum, and sum of weight times logit."""
    k = K.load([batch, kv_head, start, 0]).reshape([STEP, D])
    s = tl.dot(q, tl.trans(k))
    if R > 0:
        s = tl.dot(phi, tl.trans(PK.load([batch, phi_head, start, 0]).reshape([STEP, R])), s)
    if MASK:
        key = start + tl.arange(0, STEP)
        s = tl.where(visible(position[:, None], key[None, :], first[:, None], sink, recent, PACKED, BAND), s, _HIDDEN)
    if AXES > 0:
        at = AT + start + tl.arange(0, STEP)
        s = tl.where(within(tl.load(at)[None, :], lo0[:, None], hi0[:, None]), s, _HIDDEN)
        if AXES > 1:
            s = tl.where(within(tl.load(at + keys)[None, :], lo1[:, None], hi1[:, None]), s, _HIDDEN)
        if AXES > 2:
            s = tl.where(within(tl.load(at + 2 * keys)[None, :], lo2[:, None], hi2[:, None]), s, _HIDDEN)
    new = tl.maximum(top, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new[:, None])
    keep = tl.exp2(top - new)
    mass = mass * keep + tl.sum(p, 1)
    if ENTROPY:
        heat = heat * keep + tl.sum(p * s, 1)
    acc = acc * keep[:, None]
    v = V.load([batch, kv_head, start, 0]).reshape([STEP, D])
    return tl.dot(p.to(v.dtype), v, acc), new, mass, heat


@triton.jit(do_not_specialize=["heads", "length", "total", "keys", "tiles", "rows", "width"])
def _forward(
    Q, K, V, PQ, PK, OUT, LSE, HEAT, INDICES, ITEMS, FIRST, SINK, RECENT, BOUNDS, AT,
    stride_b, stride_h, stride_l, heads, length, total, keys, tiles, rows, width, factor,
    GROUP: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROW: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr, BAND: tl.constexpr,
    AXES: tl.constexpr, ENTROPY: tl.constexpr, ITEM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    item = ITEMS + tl.program_id(0) * ITEM
    number = tl.load(item)
    a0, a1, a2, a3 = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    owner, tile = number // tiles, number % tiles
    head, batch = owner % heads, owner // heads
    kv_head = head // GROUP
    row = (owner * rows + tile * TILE // ROW).to(tl.int64)
    query = tile * TILE + tl.arange(0, TILE)
    position = query + total - length
    first, sink, recent = position, 0, 0
    if PACKED:
        first = tl.load(FIRST + position, mask=position < total, other=0)
    if BAND:
        sink, recent = tl.load(SINK + head), tl.load(RECENT + head)
    lo0, hi0, lo1, hi1, lo2, hi2 = position, position, position, position, position, position
    if AXES > 0:  # rows past the end read the last one: they are not stored
        bound = BOUNDS + tl.minimum(query, length - 1)
        lo0, hi0 = tl.load(bound), tl.load(bound + AXES * length)
    if AXES > 1:
        lo1, hi1 = tl.load(bound + length), tl.load(bound + (AXES + 1) * length)
    if AXES > 2:
        lo2, hi2 = tl.load(bound + 2 * length), tl.load(bound + (AXES + 2) * length)
    q = Q.load([batch, head, tile * TILE, 0]).reshape([TILE, D])
    phi = q
    if R > 0:
        phi = PQ.load([batch, head, tile * TILE, 0]).reshape([TILE, R])
    acc = tl.zeros([TILE, D], tl.float32)
    top = tl.full([TILE], _LOWEST, tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    heat = tl.zeros([TILE], tl.float32)
    for place in tl.range(a1, a2, num_stages=STAGES):
        start = list_start(INDICES, place, row, width, BLOCK, STEP)
        acc, top, mass, heat = _absorb(
            q, K, V, phi, PK, AT, batch, kv_head, head // SHARE, start, keys, acc, top, mass, heat, factor, position, first, sink,
            recent, lo0, hi0, lo1, hi1, lo2, hi2, False, PACKED, BAND, AXES, ENTROPY, STEP, D, R,
        )  # fmt: skip
    for number in tl.range(0, a1 - a0 + a3 - a2, num_stages=1):
        place = tl.where(number < a1 - a0, a0 + number, a2 - a1 + a0 + number)
        start = list_start(INDICES, place, row, width, BLOCK, STEP)
        acc, top, mass, heat = _absorb(
            q, K, V, phi, PK, AT, batch, kv_head, head // SHARE, start, keys, acc, top, mass, heat, factor, position, first, sink,
            recent, lo0, hi0, lo1, hi1, lo2, hi2, True, PACKED, BAND, AXES, ENTROPY, STEP, D, R,
        )  # fmt: skip
    some = mass > 0
    share = 1.0 / tl.where(some, mass, 1.0)
    lse = tl.where(some, (top + tl.log2(mass)) * _LN2, float("-inf"))
    inside = query < length
    tl.store(LSE + owner.to(tl.int64) * length + query, lse, mask=inside)
    if ENTROPY:
        entropy = tl.where(some, lse - heat * share * (factor * _LN2), 0.0)
        tl.store(HEAT + owner.to(tl.int64) * length + query, entropy, mask=inside)
    column = tl.arange(0, D)
    out = OUT + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + query.to(tl.int64)[:, None] * stride_l
    inside = inside[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out + column[None, :], (acc * share[:, None]).to(OUT.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------- launch


class Problem(NamedTuple):
    """What one call computes, after every check.

    query_block, key_block: multiples of 16 tokens.  window: what narrows causality further.
    bias: what `gpu.bias.columns` makes of one, bfloat16 `[batch, heads, length, rank]` and `[batch, kv_heads or heads, total, rank]`.
    causal: the queries are the last of the keys; else they come behind all of them, and no key may be missing in a last block.
    boxes: bounds int32 `[2, axes, length]` and coordinates int32 `[axes, total]`: a query sees the keys within its bounds.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    counts: Tensor  # int32 [batch, heads, query blocks]
    indices: Tensor  # int32 [batch, heads, query blocks, width], ascending
    query_block: int
    key_block: int
    scale: float
    window: Window
    bias: tuple[Tensor, Tensor] | None = None
    causal: bool = True
    boxes: tuple[Tensor, Tensor] | None = None

    @property
    def numbers(self) -> tuple[int, int, int]:
        """length, total, group"""
        return self.q.shape[2], self.k.shape[2], self.q.shape[1] // self.k.shape[1]

    @property
    def end(self) -> int:
        """Where the queries end, in positions of keys."""
        return self.k.shape[2] + (0 if self.causal else self.q.shape[2])

    @property
    def rank(self) -> int:
        """Columns that carry the bias."""
        return 0 if self.bias is None else self.bias[0].shape[3]

    @property
    def axes(self) -> int:
        """Axes of the boxes."""
        return 0 if self.boxes is None else self.boxes[1].shape[0]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The bias, or something of its shape that no kernel reads."""
        return self.bias or (self.q, self.k)

    @property
    def flags(self) -> dict[str, bool]:
        """Constants of every kernel."""
        return {"PACKED": self.window.first is not None, "BAND": self.window.sink is not None}


def width(head_dim: int) -> int:
    """Columns of a tile: the next power of two, the rest is zeros."""
    return max(16, triton.next_power_of_2(head_dim))


def divisor(block: int, most: int) -> int:
    """The largest power of two that divides `block`, at most `most`."""
    return min(block & -block, most)


def forward_tiles(
    head_dim: int, query_block: int, key_block: int, need_entropy: bool, rank: int = 0, axes: int = 0
) -> Tiles:
    """The launch for a head size: two programs a multiprocessor where the registers suffice without spills."""
    columns, rows = width(head_dim), divisor(query_block, 128)
    tight = columns == 128 and rows == 128
    # At 128 columns and with the entropy or boxes two programs would spill: one, with twice the keys a step, is next best.
    alone = tight and (need_entropy or axes > 0)
    step = divisor(key_block, 128 if alone else 64)
    return Tiles(
        rows,
        step,
        warps=8 if rows == 128 else 4,
        stages=3 if columns <= 64 else 2,
        registers=128 if tight and not alone and rank <= 16 else None,
    )


def descriptor(t: Tensor, rows: int) -> TensorDescriptor:
    """A view of `[batch, heads, length, head_dim]` from which tiles of `rows` are fetched; what is outside reads as zero."""
    t = aligned(t)
    return TensorDescriptor(t, list(t.shape), strides(t), [1, 1, rows, width(t.shape[3])])


def aligned(t: Tensor) -> Tensor:
    """The tensor itself where its rows start at multiples of 16 bytes, else a copy."""
    fits = t.stride(3) == 1 and t.data_ptr() % 16 == 0
    fits = fits and all(
        n == 1 or (s > 0 and s * t.element_size() % 16 == 0) for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)
    )
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def strides(t: Tensor) -> list[int]:
    """Strides, with a legal one for dimensions of size 1."""
    return [s if n > 1 else t.shape[3] for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)] + [1]


def empty_rows(batch: int, heads: int, length: int, head_dim: int, like: Tensor) -> Tensor:
    """`[batch, heads, length, head_dim]` over memory `[batch, length, heads, head_dim]`, as models want it."""
    return like.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def work_items(p: Problem, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Work items and counter of the forward pass and of the gradient of the queries."""
    length = p.q.shape[2]
    return lists.work(
        p.counts, p.indices, p.query_block, tiles.rows, p.key_block, tiles.step, length, p.end, p.window, p.k.shape[1]
    )


def forward(p: Problem, *, need_entropy: bool, tiles: Tiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[batch, heads, length, head_dim]`, lse and entropy float32 `[batch, heads, length]` (entropy empty if unwanted)."""
    batch, heads, _, head_dim = p.q.shape
    length, _, group = p.numbers
    tiles = tiles or forward_tiles(head_dim, p.query_block, p.key_block, need_entropy, p.rank, p.axes)
    out = empty_rows(batch, heads, length, head_dim, p.q)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=p.q.device)
    entropy = torch.empty_like(lse) if need_entropy else lse.new_empty(0)
    if out.numel() == 0:
        return out, lse, entropy
    items, _ = work_items(p, tiles)
    first, _, sink, recent = p.window.pointers(p.counts)
    phi_q, phi_k = p.factors
    _forward[(items.shape[0],)](
        descriptor(p.q, tiles.rows), descriptor(p.k, tiles.step), descriptor(p.v, tiles.step),
        descriptor(phi_q, tiles.rows), descriptor(phi_k, tiles.step), out, lse, entropy, p.indices, items, first, sink,
        recent, *(p.boxes or (p.counts, p.counts)), *out.stride()[:3], heads, length, p.end, p.k.shape[2],
        -(-length // tiles.rows), p.indices.shape[2], p.indices.shape[3], p.scale * LOG2E,
        GROUP=group, SHARE=heads // phi_k.shape[1], HEAD_DIM=head_dim, D=width(head_dim), R=p.rank, ROW=p.query_block,
        TILE=tiles.rows, BLOCK=p.key_block, STEP=tiles.step, **p.flags, AXES=p.axes,
        ENTROPY=need_entropy, ITEM=ITEM, STAGES=tiles.stages, **tiles.options,
    )  # fmt: skip
    return out, lse, entropy


# ---------------------------------------------------------------------- compile without a GPU


def variants() -> list[Variant]:
    """The launches really used, for compilation without a GPU."""
    found = [_variant_forward(d, "bf16") for d in (64, 96, 128, 256)]
    found += [_variant_forward(128, "fp16"), _variant_forward(128, "bf16", query_block=64)]
    found += [_variant_forward(128, "bf16", key_block=32), _variant_forward(128, "bf16", query_block=16, key_block=16)]
    found += [_variant_forward(d, "bf16", **{kind: True}) for d in (64, 128) for kind in ("packed", "band", "entropy")]
    found += [_variant_forward(d, "bf16", rank=rank) for d in (64, 96, 128, 256) for rank in (16, 32)]
    return found + [_variant_forward(d, "bf16", axes=axes) for d, axes in ((64, 2), (128, 1), (128, 2), (128, 3))]


def tensordesc(dtype: str, rows: int, head_dim: int) -> str:
    """The signature of a descriptor argument."""
    return f"tensordesc<{dtype}[1, 1, {rows}, {width(head_dim)}]>"


def _variant_forward(
    head_dim: int,
    dtype: str,
    *,
    query_block=128,
    key_block=128,
    packed=False,
    band=False,
    entropy=False,
    rank=0,
    axes=0,
) -> Variant:
    tiles = forward_tiles(head_dim, query_block, key_block, entropy, rank, axes)
    signature = {n: "*i32" if n.isupper() else "i32" for n in _forward.arg_names}
    signature |= dict.fromkeys(("stride_b", "stride_h", "stride_l"), "i64") | {"factor": "fp32"}
    signature |= {"OUT": f"*{dtype}", "LSE": "*fp32", "HEAT": "*fp32", "Q": tensordesc(dtype, tiles.rows, head_dim)}
    signature |= {n: tensordesc(dtype, tiles.step, head_dim) for n in "KV"}
    factors = ("bf16", rank) if rank else (dtype, head_dim)
    signature |= {n: tensordesc(factors[0], r, factors[1]) for n, r in (("PQ", tiles.rows), ("PK", tiles.step))}
    constants = {
        "GROUP": 4, "SHARE": 4, "HEAD_DIM": head_dim, "D": width(head_dim), "R": rank, "ROW": query_block,
        "TILE": tiles.rows, "BLOCK": key_block, "STEP": tiles.step, "PACKED": packed, "BAND": band, "AXES": axes,
        "ENTROPY": entropy, "ITEM": ITEM, "STAGES": tiles.stages,
    }  # fmt: skip
    named = (("packed", packed), ("band", band), ("entropy", entropy), (f"rank{rank}", rank), (f"axes{axes}", axes))
    kinds = "".join(f"-{n}" for n, on in named if on)
    name = f"forward-{head_dim}-{dtype}-{query_block}x{key_block}{kinds}"
    free = frozenset({"heads", "length", "total", "keys", "tiles", "rows", "width"})
    return Variant(name, _forward, signature, constants, tiles.options, free)

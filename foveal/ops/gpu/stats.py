"""Exact attention statistics on a GPU, from the log-sum-exp: one pass by key blocks, one by query blocks.

Each reads q and k once a tile through tensor descriptors and computes whatever is asked of it at once, in O(length) memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import LOG2E, given
from .stats_kernels import columns_kernel, rows_kernel
from .variants import Variant

ABSENT = 1e30  # log-sum-exp of a row that sees nothing, and of the rows past the last: p = 0 and no NaN
RANK_WIDTHS = (16, 32, 64)  # columns that bias factors are padded to
MOST_BINS = 128
MOST_TOP = 32
FLAT = ("entropy", "sink_mass", "mean_distance", "row_max")  # float32 results of one number a query


# ---------------------------------------------------------------------- launching

_ROUND = 128  # queries that the log-sum-exp is padded to a multiple of; a multiple of every tile


class Problem(NamedTuple):
    """Checked inputs of both passes. Query i stands at position i + past and sees the keys up to there.

    q `[batch, heads, n, head_dim]`, k `[batch, kv_heads, total, head_dim]` in one dtype; lse `[batch, heads, n]`, base 2, finite;
    phi_q, phi_k: bfloat16 columns of a base-2 bias, padded to one of RANK_WIDTHS; log_mass `[batch, kv_heads or heads, total]`, base 2.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None
    log_mass: Tensor | None
    past: int
    scale: float
    softcap: float | None


def launch_columns(p: Problem, want: Sequence[str], low: Tensor | None) -> list[Tensor]:
    """Column statistics `[batch, heads, total]` in the order of `want`.

    low `[batch, heads or kv_heads or 1, n]`: for `col_low`, the base-2 logarithm below which a probability counts as low.
    """
    batch, heads, n, _ = p.q.shape
    total = p.k.shape[2]
    out = {name: p.q.new_zeros(batch, heads, total, dtype=torch.float32) for name in want}
    how = column_settings(p.q.shape[3])
    blocks, width = triton.cdiv(total, how["BN"]), triton.cdiv(n, _ROUND) * _ROUND
    lse = F.pad(p.lse, (0, width - n), value=1e30)  # past the end every probability is zero, and none is low
    low = lse if low is None else F.pad(low, (0, width - n), value=-3e38)
    columns_kernel[(batch * heads * blocks,)](
        *_described(p, how), lse, given(p.log_mass, lse), low, out.get("col_mass", lse), out.get("col_low", lse), n, width,
        total, p.past, blocks, heads, low.shape[1], *_factors(p),
        **_constants(p), SUM="col_mass" in out, LOWS="col_low" in out, **how,
    )  # fmt: skip
    return list(out.values())


def launch_rows(p: Problem, want: Sequence[str], sink: int, edges: Tensor, block: int, top: int) -> list[Tensor]:
    """Row statistics in the order of `want`: `[batch, heads, n]`, and the three that are wider.

    edges: int32 `[bins]` ascending from 0, for `offset_histogram` `[batch, heads, bins]`.  block: a multiple of 64, for `block_map`
    `[batch, heads, ceil(n / block), ceil(total / block)]`.  top: for `top_k` and `top_k_keys` `[batch, heads, n, top]`.
    """
    batch, heads, n, head_dim = p.q.shape
    total, names = p.k.shape[2], set(want)
    how = row_settings(head_dim, names, block, p.softcap is None and p.phi_q is None)
    blocks = triton.cdiv(n, how["BM"])
    flat = {name: p.lse.new_empty(batch, heads, n) for name in FLAT}
    argmax = p.lse.new_empty(batch, heads, n, dtype=torch.int64)
    bins, bin_of, edge = 0, p.lse, p.lse
    if "offset_histogram" in names:
        bins = triton.next_power_of_2(edges.numel())
        distances = torch.arange(total, dtype=torch.int32, device=edges.device)
        bin_of = torch.searchsorted(edges, distances, right=True, out_int32=True) - 1
        edge = torch.cat([edges, edges.new_full((1,), 2**31 - 1)])
    block = block if "block_map" in names else 0
    lines, width = (-(-n // block) * (block // how["BM"]), -(-total // block)) if block else (0, 0)
    top = top if names & {"top_k", "top_k_keys"} else 0
    partial_bins = p.lse.new_empty(batch, heads, blocks, bins)
    partial_map = p.lse.new_zeros(batch, heads, lines, width)
    largest = p.lse.new_empty(batch, heads, n, top)
    largest_keys = p.lse.new_empty(batch, heads, n, top, dtype=torch.int64)
    rows_kernel[(batch * heads * blocks,)](
        *_described(p, how), p.lse, given(p.log_mass, p.lse), bin_of, edge, flat["entropy"], flat["sink_mass"],
        flat["mean_distance"], flat["row_max"], argmax, partial_bins, partial_map, largest, largest_keys,
        n, total, p.past, blocks, heads, sink, lines, width, *_factors(p), **_constants(p), **row_flags(names),
        NB=bins, BLOCK=block, NTOP=top, NTOP_PADDED=triton.next_power_of_2(max(top, 1)), **how,
    )  # fmt: skip
    found = flat | {"row_argmax": argmax, "top_k": largest, "top_k_keys": largest_keys}
    if bins:
        found["offset_histogram"] = partial_bins[..., : edges.numel()].sum(2)
    if block:
        found["block_map"] = partial_map.unflatten(2, (-1, block // how["BM"])).sum(3)
    return [found[name] for name in want]


def column_settings(head_dim: int) -> dict[str, int]:
    """Tile, pipeline, warps and registers of the column pass by head size."""
    if head_dim > 128:
        return {"BM": 32, "BN": 64, "D": 256, "STAGES": 2, "num_warps": 4}
    return {"BM": 64, "BN": 128, "D": triton.next_power_of_2(head_dim), "STAGES": 3, "num_warps": 8, "maxnreg": 128}


def row_settings(head_dim: int, names: set[str], block: int, plain: bool = True) -> dict[str, int]:
    """Tile, pipeline, warps and registers of the row pass; a `block` of 64 wants tiles of 64 queries.

    plain: without soft-cap and bias.
    """
    BM = 64 if head_dim > 128 or ("block_map" in names and block % 128) else 128
    # the largest logit and its key are held for each place of the tile: beside more than the entropy only a narrow one fits
    light = plain and names <= {"row_argmax", "row_max", "entropy", "sink_mass"}
    how = {"BM": BM, "BN": 64 if light or "row_argmax" not in names else 32, "num_warps": BM // 16}
    if head_dim > 128:
        return how | {"D": 256, "STAGES": 2}
    how |= {"D": triton.next_power_of_2(head_dim), "STAGES": 3}
    # two programs of 8 warps share a multiprocessor if neither takes more than 128 registers
    return how | ({"maxnreg": 128} if BM == 128 and len(names - {"sink_mass"}) <= 3 else {})


def row_flags(names: set[str]) -> dict[str, bool | int]:
    """What the row pass is compiled for."""
    return {
        "WANT_ENTROPY": "entropy" in names,
        "WANT_SINK": "sink_mass" in names,
        "WANT_DISTANCE": "mean_distance" in names,
        "WANT_MAX": 2 if "row_argmax" in names else int("row_max" in names),
        "ALL_KEYS": bool(names - {"sink_mass"}),
    }


def _described(p: Problem, how: dict[str, int]) -> tuple:
    """Descriptors of q, k and the bias factors; a TMA load past the end reads zeros, so lengths and head sizes need no padding."""
    q, k = _descriptor(p.q, how["BM"], how["D"]), _descriptor(p.k, how["BN"], how["D"])
    if p.phi_q is None:
        return q, k, q, k
    rank = p.phi_q.shape[3]
    return q, k, _descriptor(p.phi_q, how["BM"], rank), _descriptor(p.phi_k, how["BN"], rank)


def _descriptor(t: Tensor, rows: int, width: int) -> TensorDescriptor:
    aligned = t.data_ptr() % 16 == 0 and all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:3])
    if t.stride(3) != 1 or not aligned:
        t = t.contiguous()
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, rows, width])


def _factors(p: Problem) -> tuple[float, float]:
    """(scale, cap) of `_score`, for logits in base 2."""
    return (p.scale * LOG2E, 0.0) if p.softcap is None else (2 * p.scale / p.softcap, p.softcap * LOG2E)


def _constants(p: Problem) -> dict[str, int | bool]:
    heads = p.q.shape[1]
    return {
        "GROUP": heads // p.k.shape[1],
        "BIAS_GROUP": 1 if p.phi_k is None else heads // p.phi_k.shape[1],
        "MASS_GROUP": 0 if p.log_mass is None else heads // p.log_mass.shape[1],
        "RANK": 0 if p.phi_q is None else p.phi_q.shape[3],
        "CAPPED": p.softcap is not None,
    }


# ---------------------------------------------------------------------- as nodes of a graph


@torch.library.custom_op("foveal::stats_columns", mutates_args=())
def columns(
    q: Tensor, k: Tensor, lse: Tensor, phi_q: Tensor | None, phi_k: Tensor | None, log_mass: Tensor | None,
    low: Tensor | None, past: int, scale: float, softcap: float | None, want: str,
) -> list[Tensor]:  # fmt: skip
    """`launch_columns` as one operator; `want` is separated by commas."""
    with torch.cuda.device_of(q):
        return launch_columns(Problem(q, k, lse, phi_q, phi_k, log_mass, past, scale, softcap), want.split(","), low)


@columns.register_fake
def _(q, k, lse, phi_q, phi_k, log_mass, low, past, scale, softcap, want):
    return [lse.new_empty(*q.shape[:2], k.shape[2]) for _ in want.split(",")]


@torch.library.custom_op("foveal::stats_rows", mutates_args=())
def rows(
    q: Tensor, k: Tensor, lse: Tensor, phi_q: Tensor | None, phi_k: Tensor | None, log_mass: Tensor | None,
    edges: Tensor, past: int, scale: float, softcap: float | None, sink: int, block: int, top: int, want: str,
) -> list[Tensor]:  # fmt: skip
    """`launch_rows` as one operator; `want` is separated by commas."""
    with torch.cuda.device_of(q):
        return launch_rows(
            Problem(q, k, lse, phi_q, phi_k, log_mass, past, scale, softcap), want.split(","), sink, edges, block, top
        )


@rows.register_fake
def _(q, k, lse, phi_q, phi_k, log_mass, edges, past, scale, softcap, sink, block, top, want):
    return [
        lse.new_empty(*shape, dtype=dtype) for shape, dtype in _row_shapes(q, k, edges, block, top, want.split(","))
    ]


def _row_shapes(q: Tensor, k: Tensor, edges: Tensor, block: int, top: int, want: Sequence[str]) -> list[tuple]:
    batch, heads, n, total = *q.shape[:3], k.shape[2]
    shapes = {"offset_histogram": (edges.shape[0],), "top_k": (n, top), "top_k_keys": (n, top)}
    if block:
        shapes["block_map"] = (-(-n // block), -(-total // block))
    whole = ("row_argmax", "top_k_keys")
    return [((batch, heads, *shapes.get(x, (n,))), torch.int64 if x in whole else torch.float32) for x in want]


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of these kernels over head sizes, types and statistics."""
    found = []
    for head_dim in (64, 96, 128, 256):
        found.append(_column_variant(head_dim, "bf16", SUM=True, LOWS=False))
        found.append(_column_variant(head_dim, "bf16", SUM=True, LOWS=True))
        found.append(_row_variant(head_dim, "bf16", {"entropy", "sink_mass"}))
        found.append(_row_variant(head_dim, "bf16", {"row_argmax", "mean_distance", "entropy", "sink_mass"}))
    found.append(_column_variant(128, "fp16", SUM=True, LOWS=False))
    found.append(_column_variant(128, "bf16", SUM=True, LOWS=False, RANK=16, CAPPED=True, MASS_GROUP=4))
    found.append(_row_variant(128, "fp16", {"entropy"}))
    found.append(_row_variant(128, "bf16", {"sink_mass"}))
    found.append(_row_variant(128, "bf16", {"entropy"}, RANK=16, CAPPED=True, MASS_GROUP=4))
    for head_dim in (64, 128, 256):
        found.append(_row_variant(head_dim, "bf16", {"offset_histogram"}, NB=32))
        found.append(_row_variant(head_dim, "bf16", {"top_k"}, NTOP=8, NTOP_PADDED=8))
    found += [_row_variant(128, "bf16", {"block_map"}, BLOCK=block) for block in (64, 128)]
    everything = {*FLAT, "row_argmax", "offset_histogram", "block_map", "top_k"}
    found.append(_row_variant(128, "bf16", everything, NB=32, BLOCK=128, NTOP=8, NTOP_PADDED=8))
    return found


def _column_variant(head_dim: int, dtype: str, **flags) -> Variant:
    how = column_settings(head_dim)
    pointers = dict.fromkeys(("LSE", "LOG_MASS", "LOW", "MASS", "COUNT"), "*fp32")
    numbers = dict.fromkeys(("n", "width", "total", "past", "blocks", "heads", "low_heads"), "i32")
    return _variant("columns", columns_kernel, head_dim, dtype, how, pointers, numbers, flags)


def _row_variant(head_dim: int, dtype: str, names: set[str], **flags) -> Variant:
    plain = not (flags.get("CAPPED") or flags.get("RANK"))
    how = row_settings(head_dim, names, flags.get("BLOCK", 0), plain)
    pointers = dict.fromkeys(("LSE", "LOG_MASS", "ENTROPY", "SINK", "DISTANCE", "MAX", "BINS", "MAP", "TOP"), "*fp32")
    pointers |= {"BIN": "*i32", "EDGE": "*i32", "ARGMAX": "*i64", "TOP_KEY": "*i64"}
    numbers = dict.fromkeys(("n", "total", "past", "blocks", "heads", "sink", "map_lines", "map_width"), "i32")
    flags = row_flags(names) | {"NB": 0, "BLOCK": 0, "NTOP": 0, "NTOP_PADDED": 1} | flags
    return _variant("rows " + "+".join(sorted(names)), rows_kernel, head_dim, dtype, how, pointers, numbers, flags)


def _variant(name, kernel, head_dim, dtype, how, pointers, numbers, flags) -> Variant:
    constants = {"GROUP": 4, "BIAS_GROUP": 1, "MASS_GROUP": 0, "RANK": 0, "CAPPED": False} | flags
    constants |= {key: how[key] for key in ("BM", "BN", "D", "STAGES")}
    left, right = (f"[1,1,{rows},{{}}]" for rows in (how["BM"], how["BN"]))
    rank, widened = constants["RANK"], "bf16" if constants["RANK"] else dtype
    descriptors = {f"{x}D": f"tensordesc<{dtype}{shape.format(how['D'])}>" for x, shape in (("Q", left), ("K", right))}
    for x, shape in (("FQ", left), ("FK", right)):
        descriptors[f"{x}D"] = f"tensordesc<{widened}{shape.format(rank or how['D'])}>"
    signature = descriptors | pointers | numbers | {"scale": "fp32", "cap": "fp32"}
    extras = "".join(f" {key}={constants[key]}" for key in ("RANK", "LOWS", "BLOCK", "CAPPED") if constants.get(key))
    options = {key: how[key] for key in ("num_warps", "maxnreg") if key in how}
    return Variant(
        f"{name} {head_dim} {dtype}{extras}", kernel, signature, constants, options, frozenset(numbers) - {"width"}
    )

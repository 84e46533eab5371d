"""Partial attentions joined by their log-sum-exp in one pass, and the gradients of that in another.

With w_p = exp(lse_p - lse), out = sum_p w_p out_p and lse = log sum_p exp(lse_p). For gradients g of out and m of lse:
d out_p = w_p g and d lse_p = w_p (g . (out_p - out) + m). The parts are rows `[rows, width]`, one after the other in one
tensor, or two in tensors of their own, so that nobody has to stack them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variants import Variant

_NUMBERS = 1024  # of a tile [rows, width]: 8 a thread; with more, 64-bit addresses spill
_PARAMETERS = ["parts", "rows", "width"]


@triton.jit
def _load(A, B, part, at, mask, line, TWO: tl.constexpr):
    """Entries `at` of one part, whose parts are `line` numbers long."""
    if TWO:
        if part == 0:
            x = tl.load(A + at, mask=mask, other=0.0)
        else:
            x = tl.load(B + at, mask=mask, other=0.0)
    else:
        x = tl.load(A + part * line + at, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(A, B, part, at, x, mask, line, TWO: tl.constexpr):
    if TWO:
        if part == 0:
            tl.store(A + at, x.to(A.dtype.element_ty), mask=mask)
        else:
            tl.store(B + at, x.to(B.dtype.element_ty), mask=mask)
    else:
        tl.store(A + part * line + at, x.to(A.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PARAMETERS)
def _forward(A, B, A_LSE, B_LSE, OUT, LSE, parts, rows, width, TWO: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    dim = tl.arange(0, BW)
    some = row < rows
    inside = some[:, None] & (dim < width)[None, :]
    at = row[:, None] * width + dim[None, :]
    line = rows.to(tl.int64)
    top = tl.full([BM], float("-inf"), tl.float32)
    for part in tl.range(0, parts):
        top = tl.maximum(top, _load(A_LSE, B_LSE, part, row, some, line, TWO))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BW], tl.float32)
    for part in tl.range(0, parts):
        share = tl.exp(_load(A_LSE, B_LSE, part, row, some, line, TWO) - top)
        total += share
        acc += share[:, None] * _load(A, B, part, at, inside, line * width, TWO)
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    tl.store(OUT + at, acc / safe[:, None], mask=inside)
    tl.store(LSE + row, tl.where(seen, top + tl.log(safe), float("-inf")), mask=some)


@triton.jit(do_not_specialize=_PARAMETERS)
def _backward(
    A, B, A_LSE, B_LSE, OUT, LSE, G, M, DA, DB, DA_LSE, DB_LSE, parts, rows, width,
    TWO: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    dim = tl.arange(0, BW)
    some = row < rows
    inside = some[:, None] & (dim < width)[None, :]
    at = row[:, None] * width + dim[None, :]
    line = rows.to(tl.int64)
    lse = tl.load(LSE + row, mask=some, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    g = tl.load(G + at, mask=inside, other=0.0)
    shift = tl.load(M + row, mask=some, other=0.0) - tl.sum(g * tl.load(OUT + at, mask=inside, other=0.0), 1)
    for part in tl.range(0, parts):
        weight = tl.exp(_load(A_LSE, B_LSE, part, row, some, line, TWO) - lse)
        out = _load(A, B, part, at, inside, line * width, TWO)
        _store(DA, DB, part, at, weight[:, None] * g, inside, line * width, TWO)
        _store(DA_LSE, DB_LSE, part, row, weight * (tl.sum(g * out, 1) + shift), some, line, TWO)


# ---------------------------------------------------------------------- launching


def launch_forward(outs: list[Tensor], lses: list[Tensor], stacked: bool) -> tuple[Tensor, Tensor]:
    """Join one stacked tensor `[n, ..., width]` or two tensors `[..., width]`: (out, lse) in float32."""
    (outs, lses), parts, rows, width = _lines(outs, lses), *_sizes(outs, stacked)
    shape = outs[0].shape[1:] if stacked else outs[0].shape
    out = torch.empty(shape, dtype=torch.float32, device=outs[0].device)
    lse = torch.empty(shape[:-1], dtype=torch.float32, device=outs[0].device)
    how = _tile(width)
    _forward[(triton.cdiv(rows, how["BM"]),)](
        outs[0], outs[-1], lses[0], lses[-1], out, lse, parts, rows, width, TWO=not stacked, **how
    )
    return out, lse


def launch_backward(
    outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor, g: Tensor, m: Tensor, stacked: bool
) -> list[Tensor]:
    """Gradients of the parts, then of their lse, in the parts' own dtypes."""
    (outs, lses), parts, rows, width = _lines(outs, lses), *_sizes(outs, stacked)
    d_outs, d_lses = ([torch.empty_like(t) for t in ts] for ts in (outs, lses))
    how = _tile(width)
    _backward[(triton.cdiv(rows, how["BM"]),)](
        outs[0], outs[-1], lses[0], lses[-1], out, lse, g.contiguous(), m.contiguous(), d_outs[0], d_outs[-1],
        d_lses[0], d_lses[-1], parts, rows, width, TWO=not stacked, **how,
    )  # fmt: skip
    return [*d_outs, *d_lses]


def _lines(outs: list[Tensor], lses: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [t.contiguous() for t in outs], [t.contiguous() for t in lses]


def _sizes(outs: list[Tensor], stacked: bool) -> tuple[int, int, int]:
    """Parts, rows of a part, numbers of a row."""
    parts, width = (outs[0].shape[0], outs[0].shape[-1]) if stacked else (2, outs[0].shape[-1])
    return parts, outs[0].numel() // width // (parts if stacked else 1), width


def _tile(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"BM": max(1, _NUMBERS // padded), "BW": padded, "num_warps": 4}


# ---------------------------------------------------------------------- as nodes of a graph


@torch.library.custom_op("foveal::merge_parts", mutates_args=())
def merge_parts(outs: list[Tensor], lses: list[Tensor], stacked: bool) -> tuple[Tensor, Tensor]:
    """`launch_forward` as one operator."""
    with torch.cuda.device_of(outs[0]):
        return launch_forward(outs, lses, stacked)


@merge_parts.register_fake
def _(outs, lses, stacked):
    shape = outs[0].shape[1:] if stacked else outs[0].shape
    return lses[0].new_empty(shape), lses[0].new_empty(shape[:-1])


@torch.library.custom_op("foveal::merge_parts_backward", mutates_args=())
def merge_parts_backward(
    outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor, g: Tensor, m: Tensor, stacked: bool
) -> list[Tensor]:
    """`launch_backward` as one operator."""
    with torch.cuda.device_of(outs[0]):
        return launch_backward(outs, lses, out, lse, g, m, stacked)


@merge_parts_backward.register_fake
def _(outs, lses, out, lse, g, m, stacked):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*outs, *lses)]


def _keep(ctx, inputs, output) -> None:
    outs, lses, ctx.stacked = inputs
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)


def _gradients(ctx, g: Tensor, m: Tensor):
    n, saved = ctx.parts, ctx.saved_tensors
    found = merge_parts_backward(list(saved[:n]), list(saved[n : 2 * n]), *saved[2 * n :], g, m, ctx.stacked)
    return found[:n], found[n:], None


merge_parts.register_autograd(_gradients, setup_context=_keep)


def merge_two(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`foveal.ops.merge` on a GPU."""
    return merge_parts([out, other], [lse, other_lse], False)


def merge_stacked(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`foveal.ops.merge_many` on a GPU."""
    return merge_parts([outs], [lses], True)


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of these kernels over value sizes, types and kinds."""
    found = []
    for kernel in (_forward, _backward):
        for width, dtype, two in ((64, "bf16", True), (128, "fp32", True), (128, "bf16", False), (256, "fp16", True)):
            how = _tile(width)
            names = [n for n in kernel.arg_names if n not in ("TWO", "BM", "BW")]
            signature = {n: "i32" if n in _PARAMETERS else "*fp32" for n in names}
            signature |= {n: f"*{dtype}" for n in ("A", "B", "DA", "DB") if n in names}
            constants = {"TWO": two, "BM": how["BM"], "BW": how["BW"]}
            name = f"merge {kernel.__name__.strip('_')} {width} {dtype}{' two' if two else ''}"
            found.append(Variant(name, kernel, signature, constants, {"num_warps": 4}, frozenset(_PARAMETERS)))
    return found

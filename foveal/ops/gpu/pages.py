"""One key a row into or out of its pages: decode's moves, without the host knowing any length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .launch import dependent
from .variants import Variant

if TYPE_CHECKING:
    from foveal.ops.pages import Pages


@triton.jit
def _append(
    KEY, VALUE, K, V, TABLE, LENGTH, FREE, TOP, TOKEN, IDS, key_row, value_row, table_stride, token_stride,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    n = tl.load(LENGTH + row)
    at = TABLE + row * table_stride + n // PAGE
    if n % PAGE == 0:
        left = tl.atomic_add(TOP, -1)
        page = tl.load(FREE + left - 1)
        tl.store(at, page)
    else:
        page = tl.load(at)
    slot = page.to(tl.int64) * PAGE + n % PAGE
    di = tl.arange(0, DP)
    tl.store(K + slot * D + di, tl.load(KEY + row * key_row + di, mask=di < D).to(K.dtype.element_ty), mask=di < D)
    dv = tl.arange(0, DVP)
    tl.store(
        V + slot * DV + dv, tl.load(VALUE + row * value_row + dv, mask=dv < DV).to(V.dtype.element_ty), mask=dv < DV
    )
    tl.store(TOKEN + row * token_stride + n, tl.load(IDS + row))
    tl.store(LENGTH + row, n + 1)


@triton.jit
def _drop(
    SLOT, A, B, C, E, TABLE, LENGTH, FREE, TOP, table_stride,
    WA: tl.constexpr, WB: tl.constexpr, WC: tl.constexpr, WE: tl.constexpr, WIDEST: tl.constexpr, PAGE: tl.constexpr,
    SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A and B are the pools of keys and values, C and E those of their scales."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    slot = tl.load(SLOT + row)
    n = tl.load(LENGTH + row)
    if (slot >= 0) & (slot < n):
        last = n - 1
        page = tl.load(TABLE + row * table_stride + last // PAGE)
        source = page.to(tl.int64) * PAGE + last % PAGE
        target = tl.load(TABLE + row * table_stride + slot // PAGE).to(tl.int64) * PAGE + slot % PAGE
        i = tl.arange(0, WIDEST)
        tl.store(A + target * WA + i, tl.load(A + source * WA + i, mask=i < WA), mask=i < WA)
        tl.store(B + target * WB + i, tl.load(B + source * WB + i, mask=i < WB), mask=i < WB)
        if SCALES:
            tl.store(C + target * WC + i, tl.load(C + source * WC + i, mask=i < WC), mask=i < WC)
            tl.store(E + target * WE + i, tl.load(E + source * WE + i, mask=i < WE), mask=i < WE)
        if last % PAGE == 0:
            tl.store(FREE + tl.atomic_add(TOP, 1), page)
        tl.store(LENGTH + row, last)


def append(pages: Pages, free: Tensor, top: Tensor, key: Tensor, value: Tensor, token: Tensor, ids: Tensor) -> None:
    """See `foveal.ops.pages.append_page_keys`."""
    if pages.format is not None:
        _append_codes(pages, free, top, key, value, token, ids)
        return
    _launch_append(pages.key, pages.value, pages, free, top, key, value, token, ids)


def _append_codes(pages: Pages, free, top, key, value, token, ids) -> None:
    from foveal.ops.formats import encode
    from foveal.ops.pages import as_bytes

    (k, k_scale), (v, v_scale) = encode(key, pages.format), encode(value, pages.format)
    n = pages.length.clone()
    _launch_append(as_bytes(pages.key), as_bytes(pages.value), pages, free, top, as_bytes(k), as_bytes(v), token, ids)
    at = pages.at(n[:, None]).flatten()
    pages.key_scale.flatten(0, 1)[at] = k_scale
    pages.value_scale.flatten(0, 1)[at] = v_scale


def _launch_append(key_pool, value_pool, pages, free, top, key, value, token, ids) -> None:
    D, DV = key.shape[1], value.shape[1]
    pdl, how = dependent(key)
    _append[(pages.rows,)](
        key, value, key_pool, value_pool, pages.table, pages.length, free, top, token, ids, key.stride(0), value.stride(0),
        pages.table.stride(0), token.stride(0), D=D, DP=triton.next_power_of_2(D), DV=DV, DVP=triton.next_power_of_2(DV),
        PAGE=pages.size, PDL=pdl, num_warps=1, **how,
    )  # fmt: skip


def drop(pages: Pages, free: Tensor, top: Tensor, slot: Tensor) -> None:
    """See `foveal.ops.pages.drop_page_keys`."""
    from foveal.ops.pages import pools

    key, value, *scales = pools(pages)
    C, E = scales or (key, value)
    widths = [x.shape[2] for x in (key, value, C, E)]
    pdl, how = dependent(key)
    _drop[(pages.rows,)](
        slot, key, value, C, E, pages.table, pages.length, free, top, pages.table.stride(0), WA=widths[0], WB=widths[1],
        WC=widths[2], WE=widths[3], WIDEST=triton.next_power_of_2(max(widths)), PAGE=pages.size, SCALES=bool(scales),
        PDL=pdl, num_warps=1, **how,
    )  # fmt: skip


def variants() -> list[Variant]:
    """Appending and dropping for head sizes and stored types."""
    found = []
    for D, kind in ((64, "bf16"), (96, "bf16"), (128, "bf16"), (256, "fp16"), (128, "u8"), (64, "i8")):
        pointers = dict.fromkeys(("KEY", "VALUE", "K", "V"), f"*{kind}")
        pointers |= dict.fromkeys(("TABLE", "LENGTH", "FREE", "TOP", "TOKEN", "IDS"), "*i32")
        pointers |= dict.fromkeys(("key_row", "value_row", "table_stride", "token_stride"), "i32")
        padded = triton.next_power_of_2(D)
        sizes = {"D": D, "DP": padded, "DV": D, "DVP": padded, "PAGE": 32, "PDL": True}
        found.append(Variant(f"append {D} {kind}", _append, pointers, sizes, {"num_warps": 1}))
        pointers = (
            dict.fromkeys("AB", f"*{kind}") | dict.fromkeys("CE", "*fp16") | {"SLOT": "*i64", "table_stride": "i32"}
        )
        pointers |= dict.fromkeys(("TABLE", "LENGTH", "FREE", "TOP"), "*i32")
        sizes = {
            "WA": D,
            "WB": D,
            "WC": 1,
            "WE": 1,
            "WIDEST": padded,
            "PAGE": 32,
            "SCALES": kind in ("u8", "i8"),
            "PDL": True,
        }
        found.append(Variant(f"drop {D} {kind}", _drop, pointers, sizes, {"num_warps": 1}))
    return found

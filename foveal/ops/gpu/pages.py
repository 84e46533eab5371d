"""One key a row into or out of its pages: decode's moves, without the host knowing any length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from foveal.ops.dense import last_dense
from foveal.ops.formats import TINY

from .launch import dependent, given, padded
from .variants import Variant

if TYPE_CHECKING:
    from foveal.ops.pages import Pages

FORMATS = {None: 0, "fp8": 1, "int8": 2, "int4": 3}


@triton.jit
def _rounded(x):
    """Nearest whole number, ties to even, for numbers that small."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _coarse(x, inside, TINY: tl.constexpr):
    """Codes 0..15, scale and zero of one half of a vector, as `formats.encode` makes them."""
    zero = tl.min(tl.where(inside, x, float("inf")), 0).to(tl.float16)
    top = tl.max(tl.where(inside, x, float("-inf")), 0)
    scale = tl.maximum(tl.math.div_rn(top - zero.to(tl.float32), 15.0), TINY).to(tl.float16)
    codes = _rounded(tl.math.div_rn(x - zero.to(tl.float32), scale.to(tl.float32)))
    return tl.minimum(tl.maximum(codes, 0.0), 15.0).to(tl.uint8), scale, zero


@triton.jit
def _store(X, POOL, SCALE, slot, WIDTH: tl.constexpr, PADDED: tl.constexpr, FORMAT: tl.constexpr, TINY: tl.constexpr):
    """One vector X [WIDTH] at a slot of a pool: as it is (0), e4m3 (1), int8 (2) or nibbles (3)."""
    i = tl.arange(0, PADDED)
    if FORMAT == 0:
        tl.store(POOL + slot * WIDTH + i, tl.load(X + i, mask=i < WIDTH).to(POOL.dtype.element_ty), mask=i < WIDTH)
    elif FORMAT == 3:
        HALF: tl.constexpr = WIDTH // 2
        h = tl.arange(0, PADDED // 2)
        inside = h < HALF
        low, low_scale, low_zero = _coarse(tl.load(X + h, mask=inside, other=0.0).to(tl.float32), inside, TINY)
        high, high_scale, high_zero = _coarse(
            tl.load(X + HALF + h, mask=inside, other=0.0).to(tl.float32), inside, TINY
        )
        tl.store(POOL + slot * HALF + h, low | (high << 4), mask=inside)
        tl.store(SCALE + slot * 4, low_scale)
        tl.store(SCALE + slot * 4 + 1, low_zero)
        tl.store(SCALE + slot * 4 + 2, high_scale)
        tl.store(SCALE + slot * 4 + 3, high_zero)
    else:
        TOP: tl.constexpr = 448.0 if FORMAT == 1 else 127.0
        x = tl.load(X + i, mask=i < WIDTH, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x), 0), TOP), TINY).to(tl.float16)
        x = tl.math.div_rn(x, scale.to(tl.float32))
        x = tl.minimum(tl.maximum(x, -TOP), TOP)
        if FORMAT == 2:
            x = _rounded(x)
        tl.store(POOL + slot * WIDTH + i, x.to(POOL.dtype.element_ty), mask=i < WIDTH)
        tl.store(SCALE + slot, scale)


@triton.jit
def _append(
    KEY, VALUE, K, V, K_SCALE, V_SCALE, TABLE, LENGTH, FREE, TOP, TOKEN, IDS, NEW_K, NEW_V, PLACE, HIDDEN,
    key_row, value_row, table_stride, token_stride, hidden_stride,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr,
    WINDOW: tl.constexpr, TINY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """NEW_K, NEW_V, PLACE and HIDDEN are those of `Recent`, read where WINDOW > 0."""
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
    _store(KEY + row * key_row, K, K_SCALE, slot, D, DP, FORMAT, TINY)
    _store(VALUE + row * value_row, V, V_SCALE, slot, DV, DVP, FORMAT, TINY)
    token = tl.load(IDS + row)
    tl.store(TOKEN + row * token_stride + n, token)
    if WINDOW > 0:
        place = row * WINDOW + token % WINDOW
        _store(KEY + row * key_row, NEW_K, K_SCALE, place.to(tl.int64), D, DP, 0, TINY)
        _store(VALUE + row * value_row, NEW_V, V_SCALE, place.to(tl.int64), DV, DVP, 0, TINY)
        oldest = tl.load(PLACE + place)
        if oldest >= 0:
            tl.store(HIDDEN + row * hidden_stride + oldest, 0.0)
        tl.store(PLACE + place, n)
        tl.store(HIDDEN + row * hidden_stride + n, float("-inf"))
    tl.store(LENGTH + row, n + 1)


@triton.jit
def _remove(
    row, slot, n, A, B, C, E, TABLE, LENGTH, FREE, TOP, PLACE, HIDDEN, table_stride, hidden_stride,
    WA: tl.constexpr, WB: tl.constexpr, WC: tl.constexpr, WE: tl.constexpr, WIDEST: tl.constexpr, PAGE: tl.constexpr,
    SCALES: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The last of `n` keys of a row takes the place of the one at `slot`."""
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
    if WINDOW > 0:
        w = row * WINDOW + tl.arange(0, WINDOW)
        place = tl.load(PLACE + w)
        tl.store(PLACE + w, tl.where(place == slot, -1, tl.where(place == last, slot, place)))
        mark = tl.load(HIDDEN + row * hidden_stride + last)
        tl.store(HIDDEN + row * hidden_stride + slot, mark)
        tl.store(HIDDEN + row * hidden_stride + last, 0.0)
    if last % PAGE == 0:
        tl.store(FREE + tl.atomic_add(TOP, 1), page)
    tl.store(LENGTH + row, last)


@triton.jit
def _drop(
    SLOT, A, B, C, E, TABLE, LENGTH, FREE, TOP, PLACE, HIDDEN, table_stride, hidden_stride,
    WA: tl.constexpr, WB: tl.constexpr, WC: tl.constexpr, WE: tl.constexpr, WIDEST: tl.constexpr, PAGE: tl.constexpr,
    SCALES: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A and B are the pools of keys and values, C and E those of their scales; PLACE and HIDDEN are those of `Recent`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    slot = tl.load(SLOT + row)
    n = tl.load(LENGTH + row)
    if (slot >= 0) & (slot < n):
        _remove(
            row, slot, n, A, B, C, E, TABLE, LENGTH, FREE, TOP, PLACE, HIDDEN, table_stride, hidden_stride,
            WA, WB, WC, WE, WIDEST, PAGE, SCALES, WINDOW,
        )  # fmt: skip


def append(pages: Pages, free: Tensor, top: Tensor, key: Tensor, value: Tensor, token: Tensor, ids: Tensor) -> None:
    """See `foveal.ops.pages.append_page_keys`."""
    key_row, value_row = (last_dense(x) for x in (key, value))
    D, DV = key.shape[1], value.shape[1]
    pdl, how = dependent(key)
    recent, scale = pages.recent, given(pages.key_scale, key)
    window, place, hidden = _recent(pages)
    new_key, new_value = (key, value) if recent is None else (recent.key, recent.value)
    _append[(pages.rows,)](
        key_row, value_row, pages.key, pages.value, scale, given(pages.value_scale, value), pages.table, pages.length, free, top,
        token, ids, new_key, new_value, place, hidden, key_row.stride(0), value_row.stride(0), pages.table.stride(0), token.stride(0),
        hidden.stride(0), D=D, DP=padded(D), DV=DV, DVP=padded(DV), PAGE=pages.size, FORMAT=FORMATS[pages.format],
        WINDOW=window, TINY=TINY, PDL=pdl, num_warps=1, **how,
    )  # fmt: skip


def drop(pages: Pages, free: Tensor, top: Tensor, slot: Tensor) -> None:
    """See `foveal.ops.pages.drop_page_keys`."""
    from foveal.ops.pages import pools

    key, value, *scales = pools(pages)
    C, E = scales or (key, value)
    widths = [x.shape[2] for x in (key, value, C, E)]
    pdl, how = dependent(key)
    window, place, hidden = _recent(pages)
    _drop[(pages.rows,)](
        slot, key, value, C, E, pages.table, pages.length, free, top, place, hidden, pages.table.stride(0), hidden.stride(0),
        WA=widths[0], WB=widths[1], WC=widths[2], WE=widths[3], WIDEST=triton.next_power_of_2(max(widths)), PAGE=pages.size,
        SCALES=bool(scales), WINDOW=window, PDL=pdl, num_warps=1, **how,
    )  # fmt: skip


def _recent(pages: Pages) -> tuple[int, Tensor, Tensor]:
    """Window, slots and marks of the newest keys; something no kernel reads where there are none."""
    r = pages.recent
    return (0, pages.length, pages.table) if r is None else (r.window, r.slot, r.hidden)


# ---------------------------------------------------------------------- compile without a GPU

_KINDS = {None: ("bf16", "fp16"), "fp8": ("fp8e4nv",), "int8": ("i8",), "int4": ("u8",)}


def variants() -> list[Variant]:
    """Appending and dropping for head sizes, formats, and with a residual window."""
    found = []
    for D, format, window in ((64, None, 0), (96, None, 0), (128, None, 0), (256, None, 0), (128, "fp8", 0), (128, "int8", 0),
                              (64, "int4", 0), (96, "int4", 32), (128, "int4", 128), (256, "int4", 0)):  # fmt: skip
        for kind in _KINDS[format]:
            found += [_variant_append(D, format, kind, window), _variant_drop(D, format, kind, window)]
    return found


def _variant_append(D: int, format: str | None, kind: str, window: int) -> Variant:
    plain = kind if format is None else "bf16"
    types = dict.fromkeys(("KEY", "VALUE", "NEW_K", "NEW_V"), f"*{plain}") | dict.fromkeys(("K", "V"), f"*{kind}")
    types |= dict.fromkeys(("K_SCALE", "V_SCALE"), "*fp16") | {"HIDDEN": "*fp32"}
    types |= dict.fromkeys(("TABLE", "LENGTH", "FREE", "TOP", "TOKEN", "IDS", "PLACE"), "*i32")
    types |= dict.fromkeys(("key_row", "value_row", "table_stride", "token_stride", "hidden_stride"), "i32")
    sizes = {"D": D, "DP": padded(D), "DV": D, "DVP": padded(D), "PAGE": 32, "PDL": True, "TINY": TINY}
    sizes |= {"FORMAT": FORMATS[format], "WINDOW": window}
    return Variant(f"append {D} {kind} {window}", _append, types, sizes, {"num_warps": 1})


def _variant_drop(D: int, format: str | None, kind: str, window: int) -> Variant:
    kind = "u8" if format == "fp8" else kind
    types = dict.fromkeys("AB", f"*{kind}") | dict.fromkeys("CE", "*fp16") | {"SLOT": "*i64", "HIDDEN": "*fp32"}
    types |= dict.fromkeys(("TABLE", "LENGTH", "FREE", "TOP", "PLACE"), "*i32")
    types |= dict.fromkeys(("table_stride", "hidden_stride"), "i32")
    width = D // 2 if format == "int4" else D
    sizes = {"WA": width, "WB": width, "WC": 4, "WE": 4, "WIDEST": padded(width), "PAGE": 32, "PDL": True}
    sizes |= {"SCALES": format is not None, "WINDOW": window}
    return Variant(f"drop {D} {kind} {window}", _drop, types, sizes, {"num_warps": 1})

"""Decode attention over pages: every row (sequence, KV head) has its own length and its own list of pages."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch import LOG2E, dependent, given
from .ragged_kernels import merge_kernel, split_kernel, weigh_kernel
from .variants import Variant

GROUP = 16  # query rows of one matrix product; smaller groups are padded
TILE = 64  # keys of one step
LEAST = 2  # tiles of a piece, at least: smaller ones cost more in merging than they win
FORMATS = {
    None: 0,
    "fp8": 1,
    "int8": 1,
    "int4": 2,
}  # how keys are read: as they are, one scale each, two groups of nibbles


class Wanted(NamedTuple):
    """What decode attention returns beside the output: weights of every query head, or summed over a group, or how many of a group are
    below uniform, or logits alone."""

    weights: bool = False
    mass: bool = False
    logits: bool = False
    low: bool = False

    @property
    def keys(self) -> bool:
        """One number a key, for the group as a whole."""
        return self.mass or self.low


NOTHING = Wanted()


def launch(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    length: Tensor,
    bound: int,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    extra: Tensor | None = None,
    slots: Tensor | None = None,
    run: int = 1,
    own: bool = False,
    moved: Tensor | None = None,
    window: tuple[int, int] | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    format: str | None = None,
    want: Wanted = NOTHING,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels on checked arguments: (out, lse, weights or mass or logits); see `foveal.ops.attend_ragged`."""
    rows, G, D = q.shape
    PAGE, halves = key.shape[1], 2 if format == "int4" else 1
    DV = value.shape[2] * halves
    limit = bound if slots is None else slots.shape[1] * run + own
    if window is not None:
        limit = min(limit, sum(window))
    pieces = pieces_for(rows, q.device)
    part = q.new_empty(pieces + rows, G, DV, dtype=torch.float32)
    part_lse = q.new_empty(pieces + rows, G, dtype=torch.float32)
    explicit = any(want)
    logit = q.new_empty(rows, limit, G, dtype=torch.float32) if explicit else part
    pdl, how = dependent(q)
    RP = triton.next_power_of_2(rows)
    settings = tile_settings(D, DV, rows, q.element_size(), format)
    kind = 0 if extra is None else 2 if extra.shape[1] == 1 else 1  # none, one for each query, one for the group
    if format == "int4":
        scales = tuple(x.view(torch.int64) for x in scales)
    split_kernel[(pieces + rows,)](
        q, key, value, table, length, length, given(slots, table), given(extra, part), given(moved, q), *(scales or (part, part)),
        part, part_lse, logit, table.stride(0), 0 if slots is None else slots.stride(0),
        0 if extra is None else extra.stride(0), 0 if extra is None else extra.stride(1),
        limit, 0 if moved is None else moved.shape[1], 0 if window is None else window[0],
        0 if slots is None else slots.shape[1], limit, rows, pieces,
        scale if softcap is not None else scale * LOG2E, softcap or 0.0,
        G=G, D=D, DP=triton.next_power_of_2(D), DV=DV, DVP=triton.next_power_of_2(DV), PAGE=PAGE, RP=RP, GP=GROUP,
        LEAST_TILES=LEAST, FORMAT=FORMATS[format], HAS_SLOTS=slots is not None, RUN=run, OWN=own, HAS_EXTRA=kind,
        HAS_MOVED=moved is not None, HAS_CAP=softcap is not None, HAS_WINDOW=window is not None, WRITE_LOGIT=explicit,
        VALUES=not want.logits, PRECISE=q.dtype == torch.float32, PDL=pdl, **settings, **how,
    )  # fmt: skip
    out, lse = q.new_empty(rows, G, DV), q.new_empty(rows, G, dtype=torch.float32)
    if want.logits:
        return out, lse, logit
    NB = 4 if DV >= 128 else 1
    merge_kernel[(rows * G * NB,)](
        part, part_lse, length, given(sinks, part), out, lse, limit, rows, pieces, G=G, DV=DV,
        DB=triton.next_power_of_2(-(-DV // NB)), NB=NB, RP=RP, BN=settings["BN"], LEAST_TILES=LEAST, LISTED=slots is not None, MANY=64,
        HAS_SINKS=sinks is not None, PDL=pdl, num_warps=4, **how,
    )  # fmt: skip
    if not explicit:
        return out, lse, part_lse
    weights = q.new_empty((rows, limit) if want.keys else (rows, G, limit), dtype=torch.float32)
    weigh_kernel[(triton.cdiv(limit, 512), rows)](
        logit, lse, length, weights, limit, limit, limit, G=G, GP=triton.next_power_of_2(G), BN=512, SUM=want.mass,
        LOW=want.low, LISTED=slots is not None, PDL=pdl, num_warps=4, **how,
    )  # fmt: skip
    return out, lse, weights


def pieces_for(rows: int, device: torch.device) -> int:
    """Pieces of all rows together: enough to keep every multiprocessor's loads in flight, few enough to merge cheaply."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(3 * processors, min(2048, 8 * rows))


def tile_settings(head_dim: int, value_dim: int, rows: int, itemsize: int, format: str | None) -> dict[str, int]:
    """Keys of a tile, pipeline stages and warps, by what is stored and how many rows share the device."""
    if itemsize == 4:
        return {"BN": 32, "STAGES": 2, "num_warps": 4}
    if max(head_dim, value_dim) > 128 or (rows <= 64 and format is None):
        return {"BN": TILE, "STAGES": 2 if max(head_dim, value_dim) > 128 else 3, "num_warps": 4}
    return {"BN": 2 * TILE, "STAGES": 2, "num_warps": 4}


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of these kernels over head sizes, types and options."""
    found = []
    for D in (64, 96, 128, 256):
        for flags in ({}, {"WRITE_LOGIT": True}, {"HAS_EXTRA": 1, "HAS_SLOTS": True}, {"HAS_EXTRA": 2}):
            found.append(_variant(D, "bf16", None, **flags))
    found += [_variant(D, "bf16", format) for D in (64, 128) for format in ("fp8", "int8", "int4")]
    found += [_variant(D, "bf16", None, rows=256) for D in (64, 96, 128)]
    found.append(_variant(128, "fp16", None, HAS_CAP=True, HAS_WINDOW=True))
    found.append(_variant(128, "bf16", None, HAS_MOVED=True))
    for sinks in (False, True):
        signature = dict.fromkeys(("PART", "PART_LSE", "SINKS", "LSE"), "*fp32") | {"LENGTH": "*i32", "OUT": "*bf16"}
        signature |= dict.fromkeys(("limit", "rows", "pieces"), "i32")
        constants = {
            "G": 4,
            "DV": 128,
            "DB": 32,
            "NB": 4,
            "RP": 8,
            "BN": TILE,
            "LEAST_TILES": LEAST,
            "LISTED": False,
            "MANY": 64,
        }
        constants |= {"HAS_SINKS": sinks, "PDL": True}
        found.append(Variant(f"merge sinks={sinks}", merge_kernel, signature, constants, {"num_warps": 4}))
    signature = dict.fromkeys(("LOGIT", "LSE", "WEIGHT"), "*fp32") | {"LENGTH": "*i32"}
    signature |= dict.fromkeys(("logit_stride", "width", "limit"), "i32")
    constants = {"G": 4, "GP": 4, "BN": 512, "SUM": False, "LOW": True, "LISTED": False, "PDL": True}
    found.append(Variant("weigh low", weigh_kernel, signature, constants, {"num_warps": 4}))
    return found


def _variant(D: int, dtype: str, format: str | None, rows: int = 8, **flags) -> Variant:
    stored = {None: dtype, "fp8": "fp8e4nv", "int8": "i8", "int4": "u8"}[format]
    pointers = {"Q": f"*{dtype}", "MOVED": f"*{dtype}", "K": f"*{stored}", "V": f"*{stored}"}
    pointers |= dict.fromkeys(("TABLE", "LENGTH", "HELD", "SLOTS"), "*i32") | dict.fromkeys(
        ("K_SCALE", "V_SCALE"), "*i64" if format == "int4" else "*fp16"
    )
    pointers |= dict.fromkeys(("EXTRA", "OUT", "LSE", "LOGIT"), "*fp32")
    numbers = dict.fromkeys(("table_stride", "slots_stride", "extra_row", "extra_head", "logit_stride"), "i32")
    numbers |= dict.fromkeys(("moved", "sink", "listed", "limit", "rows", "pieces"), "i32") | {
        "scale": "fp32",
        "softcap": "fp32",
    }
    settings = tile_settings(D, D, rows, 2, format)
    constants = {"G": 4, "D": D, "DP": triton.next_power_of_2(D), "DV": D, "DVP": triton.next_power_of_2(D), "PAGE": 32}
    constants |= {
        "RP": 8,
        "GP": GROUP,
        "BN": settings["BN"],
        "LEAST_TILES": LEAST,
        "FORMAT": 0,
        "STAGES": settings["STAGES"],
    }
    constants |= dict.fromkeys(
        ("HAS_SLOTS", "HAS_EXTRA", "HAS_MOVED", "HAS_CAP", "HAS_WINDOW", "WRITE_LOGIT", "PRECISE"), False
    )
    constants |= {"VALUES": True, "PDL": True, "RUN": 16, "OWN": True} | flags
    name = f"decode {D} {dtype}/{stored} rows={rows} " + " ".join(k for k, v in flags.items() if v)
    return Variant(name, split_kernel, pointers | numbers, constants, {"num_warps": settings["num_warps"]})

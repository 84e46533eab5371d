"""Scores from a few dimensions of cached keys: what they mean is said in `foveal.ops.few`.

Only those dimensions are read, by sectors of 32 bytes. Where the heads of a row vote together, their softmax is joined by the kernel of
`votes.py` and the choice made by that of `top.py`, as for votes over whole keys. Logits are in base 2 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LOG2E, dependent, padded
from .ragged import GROUP
from .top import digits_of, launch_long, long_settings
from .variants import Variant
from .votes import SHARE, _votes, heads_at_once, tiles_at_once


@triton.jit
def _few(
    Q, K, TABLE, LENGTH, DIMS, CHOSEN, Z, TOP, SUM, table_stride, z_stride, tiles, scale, softcap, kv_heads,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
    JOIN: tl.constexpr, HAS_CAP: tl.constexpr, PRECISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Z [rows, G, keys]; with JOIN also TOP, SUM [rows, G, tiles], the largest logit of a tile and the sum of exp2 below it; without, the
    newest key is left out."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = row % kv_heads
    length = tl.load(LENGTH + row)
    n = tile * BN + tl.arange(0, BN)
    gi = tl.arange(0, GP)
    wi = tl.arange(0, WP)
    some = (gi < G)[:, None]
    ok = n < length
    dim = tl.load(DIMS + head * W + wi, mask=wi < W, other=-1)
    page = tl.load(TABLE + row * table_stride + n // PAGE, mask=ok, other=0)
    at = page.to(tl.int64) * PAGE + n % PAGE
    k = tl.load(K + at[:, None] * D + dim[None, :], mask=ok[:, None] & (dim >= 0)[None, :], other=0.0)
    use = tl.load(CHOSEN + (head * G + gi[:, None]) * W + wi[None, :], mask=some & (wi < W)[None, :], other=0) != 0
    q = tl.load(Q + (row * G + gi[:, None]) * D + dim[None, :], mask=use & (dim >= 0)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee" if PRECISE else "tf32") * scale
    if HAS_CAP:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1) * 1.4426950408889634
    if not JOIN:
        ok = n < length - 1
    s = tl.where(ok[None, :], s, float("-inf"))
    tl.store(Z + (row * G + gi[:, None]) * z_stride + n[None, :], s, mask=some & (n < z_stride)[None, :])
    if JOIN:
        top = tl.max(s, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        tl.store(TOP + (row * G + gi) * tiles + tile, top, mask=gi < G)
        tl.store(SUM + (row * G + gi) * tiles + tile, tl.sum(tl.exp2(s - base[:, None]), 1), mask=gi < G)


@torch.library.custom_op("foveal::few_slots", mutates_args=())
def few_slots(
    q: Tensor, key: Tensor, table: Tensor, length: Tensor, bound: int, dims: Tensor, chosen: Tensor, scale: float,
    softcap: float | None, k: int, count: Tensor | None, each: bool,
) -> Tensor:  # fmt: skip
    return launch(q, key, table, length, bound, dims, chosen, scale, softcap, k, count, each)


@few_slots.register_fake
def _(q, key, table, length, bound, dims, chosen, scale, softcap, k, count, each):
    return q.new_empty(q.shape[0] * (q.shape[1] if each else 1), k, dtype=torch.int32)


def launch(q, key, table, length, bound, dims, chosen, scale, softcap, k, count=None, each=False) -> Tensor:
    rows, G, D = q.shape
    BN = keys_at_once(dims.shape[1], q.element_size())
    tiles, device = max(1, triton.cdiv(bound, BN)), q.device
    z = torch.empty(rows, G, bound, dtype=torch.float32, device=device)
    top = z if each else torch.empty(2, rows, G, tiles, dtype=torch.float32, device=device)
    pdl, launching = dependent(q)
    _few[(tiles, rows)](
        q.contiguous(), key, table, length, dims, chosen.view(torch.uint8), z, top[0], top[-1], table.stride(0), bound, tiles,
        scale if softcap is not None else scale * LOG2E, softcap or 0.0, len(dims), G=G, GP=GROUP, D=D, W=dims.shape[1],
        WP=padded(dims.shape[1]), PAGE=key.shape[1], BN=BN, JOIN=not each, HAS_CAP=softcap is not None,
        PRECISE=q.dtype == torch.float32, PDL=pdl, num_warps=4, **launching,
    )  # fmt: skip
    if each:
        return launch_long(z.view(rows * G, bound), k, count=count)[0]
    score = torch.empty(rows, bound, dtype=torch.float32, device=device)
    chunk, chunks, _ = long_settings(rows, bound, score.dtype)
    hist = digits_of(score)
    _votes[(chunks, rows)](
        z, top[0], top[1], length, length, length, length, score, hist, bound, tiles, chunks, 0, 0, 0, HEADS=G, ROWS=1,
        HB=heads_at_once(G, chunk), CH=chunk, TB=tiles_at_once(G, chunk), SHARE=SHARE["sum"], OWN=False, HAS_ENDS=False, HAS_KEPT=False,
        PDL=pdl, num_warps=8, **launching,
    )  # fmt: skip
    return launch_long(score, k, count=count, tallied=hist)[0]


def keys_at_once(dims: int, itemsize: int) -> int:
    """Keys of a program: what is gathered stays in registers."""
    return 64 if dims > 64 or itemsize == 4 else 128


def variants() -> list[Variant]:
    """Dimensions from a quarter of a small head to all of a large one, with and without a joined softmax."""
    found = []
    for D, W, kind in ((64, 16, "bf16"), (96, 24, "bf16"), (128, 32, "bf16"), (128, 128, "bf16"), (128, 32, "fp16"), (256, 64, "bf16"),
                       (128, 32, "fp32")):  # fmt: skip
        for join in (True, False):
            signature = dict.fromkeys(("Q", "K"), f"*{kind}") | dict.fromkeys(("TABLE", "LENGTH", "DIMS"), "*i32")
            signature |= dict.fromkeys(("Z", "TOP", "SUM"), "*fp32") | {"CHOSEN": "*u8"}
            signature |= dict.fromkeys(("table_stride", "z_stride", "tiles", "kv_heads"), "i32")
            signature |= dict.fromkeys(("scale", "softcap"), "fp32")
            constants = {"G": 4, "GP": GROUP, "D": D, "W": W, "WP": padded(W), "PAGE": 32}
            constants |= {"BN": keys_at_once(W, 4 if kind == "fp32" else 2), "JOIN": join, "HAS_CAP": W == 128}
            constants |= {"PRECISE": kind == "fp32", "PDL": True}
            loose = frozenset({"tiles", "kv_heads"})
            found.append(
                Variant(f"few {D} {W} {kind} join={join}", _few, signature, constants, {"num_warps": 4}, loose)
            )
    return found

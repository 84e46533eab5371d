"""Attention over block lists on Hopper, in Gluon: the forward pass of `blocks`, warp-specialised, with the same results."""

from __future__ import annotations

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from foveal.ops.gpu.blocks import Problem, Tiles, aligned, empty_rows, strides, work_items
from foveal.ops.gpu.blocks_hopper_kernels import forward_kernel
from foveal.ops.gpu.launch import LOG2E
from foveal.ops.gpu.lists import ITEM
from foveal.ops.gpu.variants import Variant

_ROWS = 128  # queries of a tile, 64 for each consumer


def misfit(head_dim: int, query_block: int, key_block: int) -> str | None:
    """Why this kernel does not take a problem that its twin does; None if it does."""
    if head_dim not in (64, 128):
        return f"head size {head_dim} is not 64 or 128"
    if query_block % _ROWS or key_block % 64:
        return f"blocks of {query_block} x {key_block} are not multiples of {_ROWS} x 64"
    return None


def forward_tiles(head_dim: int, key_block: int) -> Tiles:
    """The launch for a head size: rings of two, or four of the smaller tiles."""
    return Tiles(_ROWS, 128 if key_block % 128 == 0 else 64, 4, 2 if head_dim == 128 and key_block % 128 == 0 else 4)


def forward(p: Problem, *, need_entropy: bool, tiles: Tiles | None = None, programs: int | None = None):
    """As `blocks.forward`, on a Hopper GPU; `programs` defaults to one for each multiprocessor."""
    batch, heads, _, head_dim = p.q.shape
    length, _, group = p.numbers
    tiles = tiles or forward_tiles(head_dim, p.key_block)
    out = empty_rows(batch, heads, length, head_dim, p.q)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=p.q.device)
    entropy = torch.empty_like(lse) if need_entropy else lse.new_empty(0)
    if out.numel() == 0:
        return out, lse, entropy
    items, counter = work_items(p, tiles)
    programs = programs or torch.cuda.get_device_properties(p.q.device).multi_processor_count
    first, _, sink, recent = p.window.pointers(p.counts)
    phi_q, phi_k = p.factors
    forward_kernel[(min(programs, items.shape[0]),)](
        _descriptor(p.q, 64), _descriptor(p.k, tiles.step), _descriptor(p.v, tiles.step), _descriptor(phi_q, 64),
        _descriptor(phi_k, tiles.step), _descriptor(out, 64), lse, entropy, p.indices, items, counter, first, sink, recent,
        items.shape[0], heads, length, p.end, -(-length // tiles.rows),
        p.indices.shape[2], p.indices.shape[3], p.scale * LOG2E,
        GROUP=group, SHARE=heads // phi_k.shape[1], D=head_dim, R=p.rank, ROW=p.query_block,
        BLOCK=p.key_block, STEP=tiles.step, **p.flags, ENTROPY=need_entropy,
        ITEM=ITEM, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out, lse, entropy


def _layout(rows: int, head_dim: int, dtype: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], dtype)


def _descriptor(t: Tensor, rows: int) -> TensorDescriptor:
    t = aligned(t)
    layout = _layout(rows, t.shape[3], gl.bfloat16 if t.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(t, list(t.shape), strides(t), [1, 1, rows, t.shape[3]], layout)


# ---------------------------------------------------------------------- compile without a GPU


def variants() -> list[Variant]:
    """The launches really used, for compilation without a GPU."""
    found = [_variant(d, dtype, 128) for d in (64, 128) for dtype in ("bf16", "fp16")]
    found += [_variant(d, "bf16", 64) for d in (64, 128)]
    found += [_variant(d, "bf16", 128, **{on: True}) for d in (64, 128) for on in ("packed", "band", "entropy")]
    found += [_variant(d, "bf16", 128, rank=rank) for d in (64, 128) for rank in (16, 32)]
    return [*found, _variant(128, "fp16", 64, rank=16), _variant(128, "bf16", 128, band=True, rank=32)]


def _variant(head_dim: int, dtype: str, key_block: int, *, packed=False, band=False, entropy=False, rank=0) -> Variant:
    tiles = forward_tiles(head_dim, key_block)
    signature = {n: "*i32" if n.isupper() else "i32" for n in forward_kernel.arg_names}
    signature |= {"factor": "fp32", "LSE": "*fp32", "HEAT": "*fp32"}
    factors = ("bf16", rank) if rank else (dtype, head_dim)
    rows = {"Q": 64, "OUT": 64, "PQ": 64, "K": tiles.step, "V": tiles.step, "PK": tiles.step}
    for name, count in rows.items():
        kind, columns = factors if name in ("PQ", "PK") else (dtype, head_dim)
        layout = repr(_layout(count, columns, gl.bfloat16 if kind == "bf16" else gl.float16))
        signature[name] = f"tensordesc<{kind}[1, 1, {count}, {columns}],{layout}>"
    constants = {
        "GROUP": 4, "SHARE": 4, "D": head_dim, "R": rank, "ROW": 128, "BLOCK": key_block, "STEP": tiles.step,
        "PACKED": packed, "BAND": band, "ENTROPY": entropy, "ITEM": ITEM, "STAGES": tiles.stages,
    }  # fmt: skip
    kinds = "-packed" * packed + "-band" * band + "-entropy" * entropy + f"-rank{rank}" * (rank > 0)
    free = frozenset({"items", "heads", "length", "total", "tiles", "rows", "width"})
    name = f"hopper-{head_dim}-{dtype}-128x{key_block}{kinds}"
    return Variant(name, forward_kernel, signature, constants, {"num_warps": tiles.warps}, free)

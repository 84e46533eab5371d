"""Attention over block lists as one differentiable node for `torch.compile` and CUDA graphs: Gluon or Triton underneath."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.ops.gpu import blocks, blocks_backward, lists
from foveal.ops.gpu.blocks import Problem, empty_rows
from foveal.ops.gpu.lists import Window


@torch.library.custom_op("foveal::block_lists", mutates_args=())
def block_lists(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending indices of a bool map `[batch, heads, rows, columns]`; see `lists.compact`."""
    return lists.compact(block_map)


@block_lists.register_fake
def _(block_map: Tensor) -> tuple[Tensor, Tensor]:
    return block_map.new_empty(block_map.shape[:3], dtype=torch.int32), block_map.new_empty(
        block_map.shape, dtype=torch.int32
    )


@torch.library.custom_op("foveal::attend_blocks", mutates_args=())
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    starts: Tensor | None,
    sink: Tensor | None,
    recent: Tensor | None,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
    need_entropy: bool,
    hopper: bool,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[batch, heads, length, head_dim]`, lse and entropy float32 `[batch, heads, length]` (empty if unwanted).

    starts: int32 `[n + 1]` bounds of packed sequences. sink, recent: int32 `[heads]`, an exact band.
    phi_q, phi_k: columns of a bias, as `bias.columns` makes them; no gradient flows where they are given. hopper: by Gluon.
    causal: if not, every key of a listed block is seen, and no gradient flows either. The entropy carries no gradient.
    """
    p = _problem(q, k, v, counts, indices, starts, sink, recent, query_block, key_block, scale)
    if phi_q is not None:
        p = p._replace(bias=(phi_q, phi_k))
    p = p._replace(causal=causal)
    if hopper:
        from foveal.ops.gpu import blocks_hopper

        return blocks_hopper.forward(p, need_entropy=need_entropy)
    return blocks.forward(p, need_entropy=need_entropy)


@attend_blocks.register_fake
def _(
    q, k, v, counts, indices, starts, sink, recent, phi_q, phi_k, query_block, key_block, scale, need_entropy, hopper,
    causal=True,
):  # fmt: skip
    out = empty_rows(*q.shape, q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return out, lse, torch.empty_like(lse) if need_entropy else lse.new_empty(0)


@torch.library.custom_op("foveal::attend_boxes", mutates_args=())
def attend_boxes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    bounds: Tensor,
    at: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and lse over the keys of listed blocks within each query's bounds int32 `[2, axes, length]`; at: int32 `[axes, total]`."""
    p = Problem(q, k, v, counts, indices, query_block, key_block, scale, Window(), None, False, (bounds, at))
    return blocks.forward(p, need_entropy=False)[:2]


@attend_boxes.register_fake
def _(q, k, v, counts, indices, bounds, at, query_block, key_block, scale):
    return empty_rows(*q.shape, q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("foveal::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    counts: Tensor,
    indices: Tensor,
    starts: Tensor | None,
    sink: Tensor | None,
    recent: Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    p = _problem(q, k, v, counts, indices, starts, sink, recent, query_block, key_block, scale)
    return blocks_backward.backward(p, out, lse, dout, dlse)


@attend_blocks_backward.register_fake
def _(q, k, v, out, lse, dout, dlse, counts, indices, starts, sink, recent, query_block, key_block, scale):
    return tuple(empty_rows(*t.shape, t) for t in (q, k, v))


def _problem(q, k, v, counts, indices, starts, sink, recent, query_block, key_block, scale) -> Problem:
    window = Window.of(k.shape[2], starts, sink, recent)
    return Problem(q, k, v, counts, indices, query_block, key_block, scale, window)


def _remember(ctx, inputs, output) -> None:
    q, k, v, counts, indices, starts, sink, recent, _, _, *sizes, _, _, _ = inputs
    ctx.save_for_backward(q, k, v, output[0], output[1], counts, indices, starts, sink, recent)
    ctx.sizes = sizes


def _slopes(ctx, dout, dlse, _):
    q, k, v, out, lse, *rest = ctx.saved_tensors
    return *attend_blocks_backward(q, k, v, out, lse, dout, dlse, *rest, *ctx.sizes), *[None] * 13


attend_blocks.register_autograd(_slopes, setup_context=_remember)

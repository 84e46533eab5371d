"""The kernel that edits few weights, in Triton's interpreter, against the plain path in float64."""

import pytest
import torch

from foveal import ops
from foveal.ops.gpu.reweigh import launch

SCALE = 0.3


def problem(heads, kv_heads, length, total, dim, count, per_head, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, n, h, dim, generator=g).to(dtype).transpose(1, 2)
        for n, h in ((length, heads), (total, kv_heads), (total, kv_heads))
    )
    index = torch.stack(
        [torch.randperm(total, generator=g)[:count] for _ in range(2 * (heads if per_head else kv_heads))]
    )
    index = index.view(2, -1, count)
    index[:, :, 0] = 0  # the first query has nobody else to give to
    index[:, :, 1:] = index[:, :, 1:].masked_fill(index[:, :, 1:] == 0, -1)
    return q, k, v, index


SHAPES = [
    (6, 2, 70, 70, 16, 3, False),
    (3, 3, 1, 40, 64, 20, False),
    (4, 1, 65, 200, 96, 1, True),
    (9, 3, 130, 131, 16, 70, True),
]
# sinks, `to`, dtype: each of the eight combinations once, each shape with one of them and its opposite.
WAYS = [
    ((False, None, torch.float32), (True, False, torch.bfloat16)),
    ((False, False, torch.bfloat16), (True, None, torch.float32)),
    ((True, None, torch.bfloat16), (False, False, torch.float32)),
    ((True, False, torch.float32), (False, None, torch.bfloat16)),
]


@pytest.mark.parametrize(("shape", "way"), [(s, w) for s, ways in zip(SHAPES, WAYS, strict=True) for w in ways])
def test_edits_equal_the_plain_ones(shape, way):
    (heads, kv_heads, length, total, dim, count, per_head), (sinks, to, dtype) = shape, way
    q, k, v, index = problem(heads, kv_heads, length, total, dim, count, per_head, dtype)
    sinks = torch.randn(heads) if sinks else None
    gain = torch.rand(2, heads, length, generator=torch.Generator().manual_seed(1)) * 3
    hidden = torch.ones(2, index.shape[1], total + 1).scatter(2, index.where(index >= 0, total), 0.0)[..., :total]
    wide = [t.double() for t in (q, k, v)]
    out, lse = ops.attend(*wide, scale=SCALE, mass=hidden.double(), need_lse=True)
    expected = ops.reweigh_small(*wide, lse, out, index, gain.double(), scale=SCALE, to=to, hidden=True)
    if sinks is not None:
        out, lse = ops.attend(*wide, scale=SCALE, mass=hidden.double(), need_lse=True, sinks=sinks.double())
        how = {"scale": SCALE, "to": to, "hidden": True, "sinks": sinks.double()}
        expected = ops.reweigh_small(*wide, lse, out, index, gain.double(), **how)
    spread = index.repeat_interleave(max(1, kv_heads // index.shape[1]), 1)
    keys, values = (
        t.repeat_interleave(spread.shape[1] // kv_heads, 1).gather(
            2, spread.clamp(min=0)[..., None].expand(-1, -1, -1, dim)
        )
        for t in (k, v)
    )
    found = launch(q, keys, values, spread, lse.float(), out.to(dtype), gain, sinks, total - length, SCALE, to is None)
    assert found.dtype == dtype
    limit = 2e-5 if dtype == torch.float32 else 2e-2
    size = expected.abs().amax(-1, keepdim=True).clamp(min=1.0)  # a large gain makes large outputs
    assert ((found.double() - expected).abs() <= limit * size).all()

"""Maps without a causal order as the block kernel computes them, under Triton's interpreter, against full masks."""

import pytest
import torch

from foveal.ops import blocks
from foveal.patterns.blocks import attend_map

pytest.importorskip("triton", reason="needs triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("length", "total", "size", "heads"),
    [(40, 40, (16, 16), (4, 2)), (9, 70, (16, 32), (3, 1)), (20, 17, (32, 16), (7, 1)), (20, 33, (16, 16), (9, 3))],
)
def test_maps_without_order(length, total, size, heads, dtype, monkeypatch):
    """Early queries read late keys, keys that do not exist count nothing, and a row without keys is 0."""
    taken = []
    monkeypatch.setattr(blocks, "no_kernel", lambda x: taken.append(1))
    g = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(2, n, h, 24, generator=g).to(dtype).transpose(1, 2)
        for n, h in zip((length, total, total), (heads[0], *heads[1:] * 2), strict=True)
    )
    rows, columns = -(-length // size[0]), -(-total // size[1])
    block_map = torch.rand(2, heads[0], rows, columns, generator=g) < 0.6
    block_map[1, 1, 0] = False
    block_map[0, 0, 0, -1] = True
    valid = None if length == 40 else torch.rand(2, total, generator=g) < 0.8
    out, lse = attend_map(q, k, v, block_map, size, valid=valid)
    visible = block_map.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[:, :, :length, :total]
    visible = visible if valid is None else visible & valid[:, None, None]
    expected, expected_lse = full(q, k, v, visible)
    assert taken and visible[..., 1:].triu().any() and not visible.any(-1).all()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)


def full(q, k, v, visible):
    """Softmax in float64 over the visible keys."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    z = (q.double() @ k.mT * q.shape[3] ** -0.5).masked_fill(~visible, -torch.inf)
    lse = z.logsumexp(-1)
    return torch.where(visible, (z - lse[..., None]).exp(), 0.0).nan_to_num() @ v, lse

"""The merge kernels, run by Triton's interpreter, against the plain implementation and its gradients."""

import pytest
import torch

from foveal.ops.gpu import merge as gpu
from foveal.ops.merge import merge, merge_many


def parts(n, shape, width, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    outs = torch.randn(n, *shape, width, generator=g).to(dtype)
    lses = 3 * torch.randn(n, *shape, generator=g)
    lses[0].flatten()[::5] = -torch.inf
    lses.flatten(1)[:, 1] = -torch.inf  # a row that saw nothing in any part
    return outs, lses


def with_gradients(run, *inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    out, lse = run(*inputs)
    g = torch.Generator().manual_seed(1)
    weight, other = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    loss = (out * weight).sum() + (lse.masked_fill(lse.isneginf(), 0.0) * other).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


def agree(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.isnan().sum() == 0
        tolerance = 1e-2 if a.dtype != torch.float32 else 1e-5
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "width"), [((3,), 1), ((2, 3, 7), 64), ((1, 70), 96), ((2, 5), 256)])
def test_two_parts(dtype, shape, width):
    (a, b), (a_lse, b_lse) = parts(2, shape, width, dtype)
    expected = with_gradients(merge, a, a_lse, b, b_lse)
    agree(with_gradients(gpu.merge_two, a, a_lse, b, b_lse), expected)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_many_parts(n):
    outs, lses = parts(n, (2, 3, 7), 24, torch.float32)
    agree(with_gradients(gpu.merge_stacked, outs, lses), with_gradients(merge_many, outs, lses))


def test_strided_parts_and_parts_of_two_dtypes():
    outs, lses = parts(2, (3, 8, 4), 16, torch.float32)
    a, b = (t.transpose(0, 1) for t in outs)
    inputs = a, lses[0].transpose(0, 1), b.bfloat16(), lses[1].transpose(0, 1)
    agree(with_gradients(gpu.merge_two, *inputs), with_gradients(merge, *inputs))


def test_the_operator_is_declared_rightly():
    outs, lses = parts(2, (2, 5), 8, torch.float32)
    outs, lses = outs.requires_grad_(), lses.masked_fill(lses.isneginf(), 0.0).requires_grad_()
    torch.library.opcheck(gpu.merge_parts, (list(outs.unbind()), list(lses.unbind()), False))

"""Joining partial attentions: values against one softmax over everything, gradients against autograd and differences."""

import pytest
import torch

from foveal.errors import InputError
from foveal.ops import which
from foveal.ops.merge import merge, merge_many


def parts(n, shape=(2, 3, 5), keys=4, width=6, dtype=torch.float64, seed=0):
    """Logits and values of n key sets, and each set's own (out, lse)."""
    g = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, *shape, keys, generator=g, dtype=torch.float64).to(dtype)
    v = torch.randn(n, *shape, keys, width, generator=g, dtype=torch.float64).to(dtype)
    return z, v, (z.softmax(-1)[..., None, :] @ v)[..., 0, :], z.logsumexp(-1)


def whole(z, v):
    z, v = torch.cat(list(z), -1), torch.cat(list(v), -2)
    return (z.softmax(-1)[..., None, :] @ v)[..., 0, :], z.logsumexp(-1)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5), (2, 1, 3, 4)])
def test_two_parts(shape):
    z, v, outs, lses = parts(2, shape)
    torch.testing.assert_close(merge(outs[0], lses[0], outs[1], lses[1]), whole(z, v))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_many_parts(n):
    z, v, outs, lses = parts(n)
    torch.testing.assert_close(merge_many(outs, lses), whole(z, v))


def test_order_does_not_matter_and_a_part_of_nothing_changes_nothing():
    _, _, outs, lses = parts(3)
    torch.testing.assert_close(merge_many(outs, lses), merge_many(outs.flip(0), lses.flip(0)))
    nothing = torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf)
    torch.testing.assert_close(merge(outs[0], lses[0], *nothing), (outs[0], lses[0]))
    torch.testing.assert_close(merge(*nothing, outs[0], lses[0]), (outs[0], lses[0]))
    joined, lse = merge(*nothing, *nothing)
    assert torch.equal(joined, nothing[0]) and torch.equal(lse, nothing[1])


def test_far_apart_parts_do_not_overflow():
    out = torch.ones(1, 1, 2), torch.full((1, 1, 2), 3.0)
    lse = torch.full((1, 1), 500.0), torch.full((1, 1), -500.0)
    joined, total = merge(out[0], lse[0], out[1], lse[1])
    assert torch.equal(joined, out[0]) and torch.equal(total, lse[0])


def test_gradients_are_those_of_attention_over_everything():
    """Through out and lse of the parts, down to logits and values."""
    z, v, _, _ = parts(2)
    z.requires_grad_(), v.requires_grad_()
    pieces = [
        ((z_p.softmax(-1)[..., None, :] @ v_p)[..., 0, :], z_p.logsumexp(-1)) for z_p, v_p in zip(z, v, strict=True)
    ]
    for found in (merge(*pieces[0], *pieces[1]), merge_many(*(torch.stack(t) for t in zip(*pieces, strict=True)))):
        g = [torch.randn_like(t) for t in found]
        mine = torch.autograd.grad(found, (z, v), g, retain_graph=True)
        torch.testing.assert_close(mine, torch.autograd.grad(whole(z, v), (z, v), g))


def test_gradients_against_differences_and_at_nothing():
    _, _, outs, lses = parts(3, (2,), width=3)
    assert torch.autograd.gradcheck(merge_many, (outs.requires_grad_(), lses.requires_grad_()))
    out = torch.zeros(2, 3, requires_grad=True)
    lse = torch.full((2,), -torch.inf, requires_grad=True)
    joined, total = merge(out, lse, out, lse)
    (joined.sum() + total.exp().sum()).backward()
    assert torch.equal(lse.grad, torch.zeros(2)) and torch.equal(out.grad, torch.zeros(2, 3))


def test_half_precision_parts_are_joined_in_the_dtype_of_their_lse():
    z, v, outs, lses = parts(2, dtype=torch.float32)
    joined, lse = merge(outs[0].bfloat16(), lses[0], outs[1].bfloat16(), lses[1])
    assert joined.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(joined, whole(z, v)[0], atol=2e-2, rtol=2e-2)


def test_which_and_what_does_not_fit():
    _, _, outs, lses = parts(2)
    assert which("merge", outs[0], lses[0], outs[1], lses[1]).name == "torch"
    assert "cpu" in which("merge_many", outs, lses).why
    with pytest.raises(InputError, match="one shape"):
        merge(outs[0], lses[0], outs[1][..., :2], lses[1])
    with pytest.raises(InputError, match="one shape"):
        merge_many(outs, lses[..., None])
    with pytest.raises(InputError, match="half"):
        merge(outs[0], lses[0].half(), outs[1], lses[1].half())
    with pytest.raises(InputError, match="n >= 1"):
        merge_many(outs[:0], lses[:0])

"""Bias and mass folded into bfloat16 columns: the logits they give, in exact arithmetic, against float64."""

import pytest
import torch

from foveal.errors import InputError
from foveal.ops import reference
from foveal.ops.dense import HIDDEN
from foveal.ops.gpu.bias import fold_bias, split_factors


def problem(heads=4, kv_heads=2, length=12, total=19, rank=2, phi_heads=2, head_dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, n, head_dim, generator=g).bfloat16()
        for h, n in ((heads, length), (kv_heads, total), (kv_heads, total))
    )
    bias = 30 * torch.randn(2, heads, length, rank, generator=g), torch.randn(2, phi_heads, total, rank, generator=g)
    return q, k, v, bias


def spread(t, heads):
    return t.repeat_interleave(heads // t.shape[1], 1)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("phi_heads", [2, 4])
@pytest.mark.parametrize("scale", [0.25, 96**-0.5])
def test_bias_is_exact_to_a_millionth(rank, phi_heads, scale):
    q, k, v, bias = problem(rank=rank, phi_heads=phi_heads)
    folded = fold_bias(q, k, v, bias, scale=scale)
    assert folded.q.dtype == folded.k.dtype == torch.bfloat16
    assert folded.q.shape[-1] == folded.k.shape[-1] == folded.v.shape[-1] == 16 + (6 * rank + 7) // 8 * 8
    x = folded.q.double() @ spread(folded.k, 4).double().mT * scale
    plain = q.double() @ spread(k, 4).double().mT * scale
    phi_k = spread(bias[1], 4).double()
    size = bias[0].double().abs() @ phi_k.abs().mT
    assert ((x - plain - bias[0].double() @ phi_k.mT).abs() <= 1e-6 * size).all()
    one = (bias[0].bfloat16().double() @ phi_k.bfloat16().double().mT - bias[0].double() @ phi_k.mT).abs() / size
    assert one.max() > 1e-3  # what a single bfloat16 would lose


@pytest.mark.parametrize("mass_heads", [2, 4])
def test_attention_over_folded_inputs(mass_heads):
    q, k, v, bias = problem(length=19)
    mass = torch.randint(0, 9, (2, mass_heads, 19), generator=torch.Generator().manual_seed(1)).float()
    mass[:, :, :2], mass[:, :, 2] = 0, 1  # two rows that see nothing
    expected, lse = reference.attend(q, k, v, scale=0.25, bias=bias, mass=mass)
    folded = fold_bias(q, k, v, bias, mass, scale=0.25)
    out, found = reference.attend(folded.q, folded.k, folded.v, scale=0.25)
    assert ((found < HIDDEN / 2) == lse.isneginf()).all()
    torch.testing.assert_close(found[:, :, 2:], lse[:, :, 2:], atol=5e-5, rtol=0)
    torch.testing.assert_close(out[:, :, 2:, : folded.value_dim], expected[:, :, 2:], atol=1e-4, rtol=1e-4)


def test_a_mass_alone_takes_three_columns_and_wide_values_stay_wide():
    q, k, v, _ = problem()
    folded = fold_bias(q, k, torch.cat([v, v, v], -1), mass=torch.ones(2, 2, 19), scale=1.0, multiple=16)
    assert folded.q.shape[-1] == 32 and folded.v.shape[-1] == folded.value_dim == 48 and folded.k.shape[1] == 2


def test_factors_are_padded_with_zeros():
    phi_q, phi_k = torch.randn(1, 2, 5, 2), torch.randn(1, 2, 7, 2)
    q, k = split_factors(phi_q, phi_k, 32)
    assert q.shape[-1] == k.shape[-1] == 32 and not q[..., 12:].any() and not k[..., 12:].any()
    torch.testing.assert_close(q.double() @ k.double().mT, phi_q.double() @ phi_k.double().mT, atol=2e-6, rtol=1e-6)


def test_only_bfloat16():
    q, k, v, bias = problem()
    with pytest.raises(InputError, match="bfloat16"):
        fold_bias(q.half(), k.half(), v.half(), bias, scale=1.0)

"""Biases by factors against the same bias written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from foveal.errors import InputError
from foveal.patterns.flash_bias import (
    FactorNets,
    alibi,
    alibi_slopes,
    biased_attention,
    factorize,
    given_bias_attention,
    multiplied,
    squared_distance,
)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def dense(q, k, v, bias, causal=False):
    """Softmax attention with a whole bias [batch or 1, heads, length, total]; its lse."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    x = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    if causal:
        x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool).triu(1 + x.shape[-1] - x.shape[-2]), -math.inf)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def test_slopes():
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9))
    torch.testing.assert_close(alibi_slopes(6)[4:], torch.tensor([2.0**-1, 2.0**-3]))


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_is_exact(causal):
    q, k, v = draw(2, 6, 130 if not causal else 9, 8), draw(2, 2, 130, 8), draw(2, 2, 130, 8)
    slopes = alibi_slopes(6).double()
    pair = alibi(q.shape[2], 130, slopes, batch=2, kv_heads=2, dtype=torch.float64)
    i, j = torch.arange(130)[130 - q.shape[2] :, None], torch.arange(130)
    whole = slopes[:, None, None] * (j - i)
    out, lse = biased_attention(q, k, v, pair, causal=causal)
    expected = dense(q, k, v, whole, causal)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_alibi_keeps_far_positions_apart_in_half_precision():
    q, k, v = (torch.zeros(1, 1, 3000, 8, dtype=torch.bfloat16) for _ in range(3))
    v[0, 0, ::2] = 1
    pair = alibi(3000, 3000, torch.tensor([1.0]))
    _, lse = biased_attention(q, k, v, pair, causal=True)
    far = torch.tensor([sum(math.exp(-d) for d in range(40))]).log().float()
    torch.testing.assert_close(lse[0, 0, -200:], far.expand(200), rtol=0, atol=1e-3)


def test_distance_and_its_gradients():
    q, k, v, x = draw(2, 4, 7, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 8), (draw(2, 7, 3) + 50).requires_grad_()
    weight = (-torch.rand(4, dtype=torch.float64)).requires_grad_()
    aim = draw(2, 4, 7, 8)
    out, lse = biased_attention(q, k, v, squared_distance(x, x, weight))
    got = torch.autograd.grad((out * aim).sum(), (x, weight))
    whole = weight[:, None, None] * (x[:, :, None] - x[:, None]).square().sum(-1)[:, None]
    expected, expected_lse = dense(q, k, v, whole)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    for a, b in zip(got, torch.autograd.grad((expected * aim).sum(), (x, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_rank_is_what_the_energy_asks_and_the_error_is_bounded():
    bias = draw(3, 12, 10)
    bias[1] = draw(12, 2) @ draw(2, 10)
    low = factorize(bias, energy=0.9)
    for h in range(3):
        s = torch.linalg.svdvals(bias[h])
        kept = s.square().cumsum(0) / s.square().sum()
        assert low.ranks[h] == int((kept < 0.9).sum()) + 1
        made = low.factors[0][0, h] @ low.factors[1][0, h].mT
        assert (made - bias[h]).abs().max() <= low.error[h] + 1e-9
        torch.testing.assert_close(torch.linalg.matrix_norm(made - bias[h], 2), low.error[h])
    assert factorize(bias, energy=1 - 1e-12).ranks[1] == 2


def test_all_of_the_rank_is_exact_and_none_is_no_bias():
    q, k, v, bias = draw(1, 2, 9, 8), draw(1, 2, 9, 8), draw(1, 2, 9, 8), draw(2, 9, 9)
    out, _ = biased_attention(q, k, v, factorize(bias, rank=9).factors)
    torch.testing.assert_close(out, dense(q, k, v, bias)[0])
    torch.testing.assert_close(biased_attention(q, k, v, factorize(bias, rank=0).factors)[0], dense(q, k, v, 0.0)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_heads_of_high_rank_keep_their_bias(causal):
    q, k, v, bias = draw(2, 3, 20, 8), draw(2, 3, 20, 8), draw(2, 3, 20, 8), 3 * draw(3, 20, 20)
    bias[1] = draw(20, 2) @ draw(2, 20)
    low = factorize(bias)
    assert (low.ranks > 8).tolist() == [True, False, True]
    out = given_bias_attention(q, k, v, bias, low, most=8, causal=causal)
    torch.testing.assert_close(
        out, dense(q, k, v, bias, causal)[0], rtol=1e-5, atol=0.05
    )  # rank 1 may leave 0.5 % of energy
    torch.testing.assert_close(out[:, ::2], dense(q, k, v, bias, causal)[0][:, ::2])


def test_multiplied_logits():
    q, k, phi_q, phi_k = draw(1, 2, 5, 8), draw(1, 2, 6, 8), draw(1, 2, 5, 3), draw(1, 2, 6, 3)
    wide_q, wide_k = multiplied(q, k, (phi_q, phi_k))
    torch.testing.assert_close(wide_q @ wide_k.mT, (q @ k.mT) * (phi_q @ phi_k.mT))


def test_nets_learn_a_bias():
    z = torch.randn(1, 16, 4)
    bias = torch.cdist(z, z)[:, None].expand(-1, 2, -1, -1)
    nets = FactorNets(4, heads=2, rank=6, hidden=32)
    before = F.mse_loss(torch.matmul(*(p if n == 0 else p.mT for n, p in enumerate(nets(z, z)))), bias).item()
    assert nets.fit(z, z, bias, steps=200, lr=1e-2) < 0.05 * before


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="mask"):
        factorize(torch.full((1, 2, 2), -math.inf))
    with pytest.raises(InputError, match="rank"):
        factorize(torch.zeros(1, 2, 2), rank=-1)
    with pytest.raises(InputError, match="append"):
        alibi(5, 4, torch.ones(1))
    with pytest.raises(InputError, match="points"):
        squared_distance(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2), torch.ones(1))
    q = torch.zeros(1, 1, 4, 8)
    phi = torch.zeros(1, 1, 4, 2)
    for wrong in (phi[:, :, :3], phi[0, 0], phi.expand(3, -1, -1, -1), phi.expand(-1, 3, -1, -1), phi[..., :1]):
        for pair in ((wrong, phi), (phi, wrong)):
            with pytest.raises(InputError, match="bias features"):
                biased_attention(q, q, q, pair)
            with pytest.raises(InputError, match="bias features"):
                multiplied(q, q, pair)
    with pytest.raises(InputError, match="slopes"):
        alibi(4, 4, torch.ones(2, 2))
    with pytest.raises(InputError, match="factors of this bias"):
        given_bias_attention(q, q, q, torch.randn(1, 4, 4), factorize(torch.randn(3, 4, 4)))
    nets, z = FactorNets(4, 2, 2), torch.zeros(1, 3, 4)
    with pytest.raises(InputError, match="expected a bias"):
        nets.fit(z, z, torch.zeros(1, 3, 3, 3))

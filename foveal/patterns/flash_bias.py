"""FlashBias (Wu et al., 2025): a bias of low rank as extra columns of queries and keys, so that no n x n bias is ever read.

A bias B = phi_q phi_k^T is the pair (phi_q `[batch, heads, length, rank]`, phi_k `[batch, heads or kv_heads, total, rank]`), which
`foveal.ops.attend` and every other causal operation take as `bias`; `biased_attention` is the same without a causal order. What is 0
or -inf is a mask and has no low rank: never factor it. The factors are float32 (float64 for float64 inputs) and stay so: half
precision would round positions from 256 on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveal.errors import InputError
from foveal.ops import attend
from foveal.ops.dense import spread, wide

from .blocks import attend_map, check_heads

Factors = tuple[Tensor, Tensor]
_BLOCK = 128


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes, `[heads]`: 2^(-8 h / heads) for a power of two, else those of the next lower and every other of the next higher."""
    if heads < 1:
        raise InputError(f"expected at least 1 head, got {heads}; give the query heads")
    lower = 1 << heads.bit_length() - 1
    slopes = [2.0 ** (-8 * (h + 1) / lower) for h in range(lower)]
    slopes += [2.0 ** (-4 * (2 * h + 1) / lower) for h in range(heads - lower)]
    return torch.tensor(slopes)


def alibi(
    length: int, total: int, slopes: Tensor, *, batch: int = 1, kv_heads: int = 1, device=None, dtype=torch.float32
) -> Factors:
    """ALiBi m_h (j - i) exactly, rank 2; the queries are the last `length` of `total` positions, `slopes` `[heads]`.

    Slopes stand in phi_q alone, so KV heads share phi_k. Positions count from the middle, which halves their rounding.
    """
    if slopes.dim() != 1:
        raise InputError(f"expected slopes [heads], got {[*slopes.shape]}; give one for each query head")
    if not 0 < length <= total:
        raise InputError(
            f"expected from 1 query up to as many as keys, got {length} and {total}; append the keys first"
        )
    slopes = slopes.to(device=device, dtype=dtype)
    key = torch.arange(total, device=device, dtype=dtype) - total // 2
    query = key[total - length :]
    phi_q = slopes[:, None, None] * torch.stack([torch.ones_like(query), -query], -1)
    phi_k = torch.stack([key, torch.ones_like(key)], -1)
    return phi_q.expand(batch, -1, -1, -1), phi_k.expand(batch, kv_heads, -1, -1)


def squared_distance(x_q: Tensor, x_k: Tensor, weight: Tensor, *, kv_heads: int = 1) -> Factors:
    """weight_h ||x_i - x_j||^2 exactly, rank axes + 2 (5 in space); points `[batch, length, axes]`, weights `[heads]`.

    A negative weight lets attention fall with distance. Differentiable in points and weights.
    """
    if x_q.dim() != 3 or x_k.dim() != 3 or x_q.shape[::2] != x_k.shape[::2] or weight.dim() != 1:
        raise InputError(
            f"expected points [batch, length, axes] and weights [heads], got {list(x_q.shape)}, {list(x_k.shape)}, {list(weight.shape)}"
        )
    centre = x_k.mean(1, keepdim=True)  # distances stay, and large coordinates no longer cancel
    x_q, x_k = x_q - centre, x_k - centre
    one_q, one_k = torch.ones_like(x_q[..., :1]), torch.ones_like(x_k[..., :1])
    phi_q = torch.cat([x_q.square().sum(-1, keepdim=True), one_q, -2 * x_q], -1)
    phi_k = torch.cat([one_k, x_k.square().sum(-1, keepdim=True), x_k], -1)
    return weight[None, :, None, None] * phi_q[:, None], phi_k[:, None].expand(-1, kv_heads, -1, -1)


@dataclass(frozen=True)
class LowRank:
    """Factors of a given bias. `ranks` `[heads]`: what each head needs; `error` `[heads]`: largest possible logit error."""

    factors: Factors  # [1, heads, length, rank] and [1, heads, total, rank]; zero beyond a head's rank
    ranks: Tensor
    error: Tensor


def factorize(bias: Tensor, *, rank: int | None = None, energy: float = 0.995) -> LowRank:
    """Singular value decomposition of a fixed bias `[heads, length, total]`, head by head.

    `rank`: of every head; otherwise the smallest that keeps `energy` of the sum of squared singular values (the paper keeps 0.99 to
    0.995 and leaves heads that need more than 16 on the dense path: see `given_bias_attention`). Raises `InputError` for other
    shapes, infinite entries (a mask is no bias), a rank below 0 or an energy outside 0 to 1.
    """
    if bias.dim() != 3 or not bias.is_floating_point():
        raise InputError(
            f"expected a float bias [heads, length, total], got {bias.dtype} {list(bias.shape)}; reshape it"
        )
    if not bool(bias.isfinite().all()):
        raise InputError("expected a finite bias, got infinities or NaN; pass what hides keys as a mask")
    if (rank is not None and rank < 0) or not 0 < energy <= 1:
        raise InputError(f"expected a rank from 0 and an energy above 0 up to 1, got {rank} and {energy}; change them")
    u, s, vh = torch.linalg.svd(bias.double(), full_matrices=False)
    if rank is None:
        left = s.square().flip(-1).cumsum(-1).flip(-1)  # what is lost if one stops before the r-th
        ranks = (left > (1 - energy) * left[:, :1] + 1e-24 * left[:, :1]).sum(-1)
    else:
        ranks = torch.full((len(bias),), min(rank, s.shape[1]), device=bias.device)
    most = int(ranks.max())
    root = s[:, :most].sqrt() * (torch.arange(most, device=s.device) < ranks[:, None])
    dtype = wide(bias.dtype)
    phi_q, phi_k = (u[..., :most] * root[:, None]).to(dtype), (vh[:, :most].mT * root[:, None]).to(dtype)
    error = torch.nn.functional.pad(s, (0, 1)).gather(1, ranks[:, None])[:, 0].to(dtype)
    return LowRank((phi_q[None], phi_k[None]), ranks, error)


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Factors, *, scale: float | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + phi_q phi_k^T) v and its log-sum-exp; factors with a batch of 1 serve every sequence.

    `scale`: 1 / sqrt(head_dim) unless given. Without `causal` every query sees every key. Differentiable in all, factors included.
    Raises `InputError` for shapes that do not fit.
    """
    check_heads(q, k, v)
    _check_factors(q, k, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    phi_q, phi_k = (phi.expand(q.shape[0], -1, -1, -1) for phi in bias)
    phi_q = phi_q.expand(-1, q.shape[1], -1, -1)
    if phi_k.shape[1] == 1:
        phi_k = phi_k.expand(-1, k.shape[1], -1, -1)
    none = phi_q.shape[-1] == 0
    pair = None if none else (phi_q, phi_k)
    if causal:
        return attend(q, k, v, scale=scale, bias=pair, need_lse=True)
    every = torch.ones(-(-q.shape[2] // _BLOCK), -(-k.shape[2] // _BLOCK), dtype=torch.bool, device=q.device)
    return attend_map(q, k, v, every, (_BLOCK, _BLOCK), scale=scale, bias=pair)


def _check_factors(q: Tensor, k: Tensor, bias: Factors) -> None:
    """Raise `InputError` unless factors are of these queries and keys; one batch or one head may serve all."""
    for phi, t, heads in zip(bias, (q, k), ((1, q.shape[1]), (1, k.shape[1], q.shape[1])), strict=True):
        fits = phi.dim() == 4 and phi.shape[0] in (1, q.shape[0]) and phi.shape[1] in heads
        if not fits or phi.shape[2] != t.shape[2] or phi.shape[3] != bias[0].shape[-1]:
            raise InputError(
                f"expected bias features [batch, heads, length, rank] for q {[*q.shape]} and k {[*k.shape]}, "
                f"got {[*bias[0].shape]} and {[*bias[1].shape]}; give one row for each query and each key"
            )


def given_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    low: LowRank,
    *,
    most: int = 16,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention with a fixed bias `[heads, length, total]`: heads of rank up to `most` (16, the paper's) by factors, others exactly.

    `low` is `factorize(bias)`, made once. Returns out `[batch, heads, length, value_dim]`. Raises `InputError` for a bias or factors
    of other shapes.
    """
    check_heads(q, k, v)
    if bias.shape != (*q.shape[1:3], k.shape[2]):
        raise InputError(
            f"expected a bias {[*q.shape[1:3], k.shape[2]]}, got {list(bias.shape)}; give each head, query and key one"
        )
    if (
        low.ranks.shape != (q.shape[1],)
        or low.factors[0].shape[2] != q.shape[2]
        or low.factors[1].shape[2] != k.shape[2]
    ):
        raise InputError(f"expected the factors of this bias {[*bias.shape]}, got others; factorize it first")
    scale, heads = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[1]
    k, v = spread(k, heads), spread(v, heads)
    by_factors = (low.ranks <= most).to(q.device)
    easy, hard = by_factors.nonzero()[:, 0], (~by_factors).nonzero()[:, 0]
    outs = []
    if len(easy):
        width = int(low.ranks[low.ranks <= most].max())
        pair = tuple(phi[:, easy, :, :width] for phi in low.factors)
        outs.append(biased_attention(q[:, easy], k[:, easy], v[:, easy], pair, scale=scale, causal=causal)[0])
    if len(hard):
        x = bias[hard].to(q.dtype)
        if causal:
            later = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1 + x.shape[-1] - x.shape[-2])
            x = x.masked_fill(later, -math.inf)
        outs.append(
            nn.functional.scaled_dot_product_attention(
                q[:, hard], k[:, hard], v[:, hard], attn_mask=x.expand(q.shape[0], -1, -1, -1), scale=scale
            )
        )
    return torch.cat(outs, 1)[:, torch.cat([easy, hard]).argsort()]


def multiplied(q: Tensor, k: Tensor, factor: Factors) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product is (q . k) B for B = phi_q phi_k^T: rank * head_dim columns (reconstructed).

    Raises `InputError` for factors of other queries or keys.
    """
    _check_factors(q, k, factor)
    phi_q, phi_k = factor
    wide_q = (phi_q[..., :, None] * q[..., None, :]).flatten(-2)
    return wide_q, (phi_k[..., :, None] * k[..., None, :]).flatten(-2)


class FactorNets(nn.Module):
    """Factors of a bias that depends on data: two nets of three linear layers, tanh between, hidden size 256 (the paper's).

    z_q `[batch, length, width]` and z_k `[batch, total, width]` are features of rows and columns; for a pair representation the paper
    takes the mean over the other axis beside the single features. `fit` trains them on a bias the frozen model made.
    """

    def __init__(self, width: int, heads: int, rank: int, hidden: int = 256) -> None:
        super().__init__()
        if min(width, heads, rank, hidden) < 1:
            raise InputError(f"expected sizes from 1 up, got {width}, {heads}, {rank} and {hidden}; change them")
        self.heads, self.rank = heads, rank
        self.query, self.key = (
            nn.Sequential(
                nn.Linear(width, hidden),
                nn.Tanh(),
                nn.Linear(hidden, hidden),
                nn.Tanh(),
                nn.Linear(hidden, heads * rank),
            )
            for _ in range(2)
        )

    def forward(self, z_q: Tensor, z_k: Tensor) -> Factors:
        """Factors `[batch, heads, length, rank]` and `[batch, heads, total, rank]`."""
        return tuple(
            net(z).unflatten(-1, (self.heads, self.rank)).transpose(1, 2)
            for net, z in ((self.query, z_q), (self.key, z_k))
        )

    def fit(self, z_q: Tensor, z_k: Tensor, bias: Tensor, *, steps: int = 1000, lr: float = 1e-3) -> float:
        """Train on a bias `[batch, heads, length, total]` by mean squared error with Adam (steps and rate are ours); the last error."""
        wanted = (z_q.shape[0], self.heads, z_q.shape[1], z_k.shape[1])
        if bias.shape != wanted or steps < 1:
            raise InputError(
                f"expected a bias {[*wanted]} and at least 1 step, got {[*bias.shape]} and {steps}; correct them"
            )
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        for _ in range(steps):
            phi_q, phi_k = self(z_q, z_k)
            loss = nn.functional.mse_loss(phi_q @ phi_k.mT, bias)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            phi_q, phi_k = self(z_q, z_k)
            return float(nn.functional.mse_loss(phi_q @ phi_k.mT, bias))

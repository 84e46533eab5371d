"""The operator view: any mixer is y_i = sum_j W_ij x_j. How many heads does that take, and how far do gradients reach? (2025 [74])

Operators are [queries, keys, outputs, inputs]; maps are [heads, outputs, inputs]; kernels by lag are [length, outputs, inputs].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedModel
from ..method import check_count
from ..model_info import ModelInfo
from .reading import _blocks
from .result import Measure

# ---------------------------------------------------------------------- operators of mixers


def ssm_kernels(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """Lag operators C A^t B of a linear state-space model, t = 0 .. length - 1, [length, outputs, inputs].

    a [state, state], b [state, inputs], c [outputs, state].
    """
    check_count("length", length, 1)
    state = a.shape[0]
    if a.shape != (state, state) or b.shape[:1] != (state,) or c.shape[1:] != (state,):
        raise InputError(
            f"expected a [state, state], b [state, inputs] and c [outputs, state], got {list(a.shape)}, {list(b.shape)}, {list(c.shape)}"
        )
    kernels, carried = [], b
    for _ in range(length):
        kernels.append(c @ carried)
        carried = a @ carried
    return torch.stack(kernels)


def by_lag(kernels: Tensor) -> Tensor:
    """The causal operator whose W_ij is kernels[i - j]."""
    n = kernels.shape[0]
    lag = torch.arange(n)[:, None] - torch.arange(n)
    return kernels[lag.clamp(min=0)] * (lag >= 0)[:, :, None, None].to(kernels)


def value_maps(w_v: Tensor, w_o: Tensor) -> Tensor:
    """V_h = W_O^h W_V^h of each head; w_v [kv_heads, head_dim, inputs], w_o [heads, outputs, head_dim]."""
    return w_o @ w_v.repeat_interleave(w_o.shape[0] // w_v.shape[0], 0)


def attention_operator(weights: Tensor, maps: Tensor) -> Tensor:
    """W_ij = sum_h a^h_ij V_h from weights [heads, queries, keys], taken as given, and maps."""
    return torch.einsum("hij,hoe->ijoe", weights, maps)


def operator_of(mixer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of mixer(x)_i by x_j, at x [length, inputs]; mixer gives [length, outputs].

    For a mixer linear in x that is its operator; for softmax attention it also holds how the weights change with x, which
    `attention_operator` leaves out.
    """
    return torch.autograd.functional.jacobian(mixer, x).transpose(1, 2)


def apply(operator: Tensor, x: Tensor) -> Tensor:
    """y_i = sum_j W_ij x_j, [queries, outputs]; x [keys, inputs]."""
    return torch.einsum("ijoe,je->io", operator, x)


# ---------------------------------------------------------------------- rank and heads


def interaction_rank(maps: Tensor, tolerance: float | None = None) -> int:
    """The dimension of the span of operators or maps [..., outputs, inputs]: no fewer heads give them all.

    tolerance: singular values up to this share of the largest count as zero; default: machine precision times the larger side.
    """
    flat = maps.flatten(end_dim=-3).flatten(1)
    return int(torch.linalg.matrix_rank(flat, rtol=tolerance))


def effective_rank(maps: Tensor) -> float:
    """exp of the entropy of the singular values, as shares, of the same matrix: how many maps it comes near."""
    s = torch.linalg.svdvals(maps.flatten(end_dim=-3).flatten(1).double())
    p = s / s.sum()
    return float(torch.special.xlogy(p, p).sum().neg().exp())


def as_heads(kernels: Tensor, heads: int | None = None) -> tuple[Tensor, Tensor]:
    """(weights by lag [length, heads], maps): the linear heads closest to a causal operator; exact from its interaction rank on.

    heads: default that rank. A head's weight of key j for query i is weights[i - j, head], of either sign, and does not depend on the
    input. Raises InputError for more heads than there are singular values.
    """
    flat = kernels.flatten(1)
    heads = max(1, interaction_rank(kernels)) if heads is None else heads
    check_count("heads", heads, 1)
    if heads > min(flat.shape):
        raise InputError(f"expected at most {min(flat.shape)} heads for kernels {list(kernels.shape)}, got {heads}")
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    return u[:, :heads] * s[:heads], v[:heads].unflatten(1, kernels.shape[1:])


def heads_floor(kernels: Tensor, heads: int) -> Tensor:
    """The smallest squared Frobenius error of so many linear heads (Eckart and Young): the tail of the squared singular values."""
    return torch.linalg.svdvals(kernels.flatten(1))[heads:].square().sum()


def nonnegative(weights: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """The same operator with twice the heads and no negative weight, as softmax would need: parts of each sign, maps of both signs.

    Rows still do not sum to one: a softmax head also needs a factor for each query, or somewhere to put the rest.
    """
    return torch.cat([weights.clamp(min=0), (-weights).clamp(min=0)], -1), torch.cat([maps, -maps])


def path_norms(operator: Tensor) -> Tensor:
    """How strongly the last query depends on each key, by distance: spectral norms of W_ij for i = n - 1, j = n - 1 .. 0, [n].

    A stable state-space model decays geometrically; attention that finds its key does not.
    """
    return torch.linalg.matrix_norm(operator[-1].flip(0), ord=2)


# ---------------------------------------------------------------------- of a trained model


@torch.no_grad()
def interaction(model, tolerance: float = 1e-5) -> list[Measure]:
    """How many of its heads' value maps V_h = W_O^h W_V^h are independent in every layer with full attention.

    An upper bound on the interaction rank on any text, reached where weights differ between heads. From the Gram matrix of the maps,
    [heads, heads]. tolerance: relative size of singular values that count as zero, above float32 noise (1e-5).
    Returns measures [layer] "interaction.rank" and "interaction.effective"; raises UnsupportedModel where the projections are unknown.
    """
    info = ModelInfo.of(model)
    rank, effective = torch.full((info.n_layers,), torch.nan), torch.full((info.n_layers,), torch.nan)
    for i in info.layers:
        s = torch.linalg.eigvalsh(_gram(*projections(model, i, info))).clamp(min=0).sqrt()
        p = s / s.sum()
        rank[i] = (s > tolerance * s.max()).sum()
        effective[i] = torch.special.xlogy(p, p).sum().neg().exp()
    axes = ("layer",)
    return [
        Measure.of("interaction.rank", rank, axes, "heads", f"independent value maps of its {info.heads} heads"),
        Measure.of("interaction.effective", effective, axes, "heads", "how many they come near: entropy of singular values"),
    ]  # fmt: skip


def projections(model, layer: int, info: ModelInfo | None = None) -> tuple[Tensor, Tensor]:
    """(w_v [kv_heads, head_dim, inputs], w_o [heads, outputs, head_dim]) of a layer, float64, biases left out.

    Knows v_proj, the fused qkv_proj, and query_key_value that is interleaved by head. Raises UnsupportedModel for others.
    """
    info = info or ModelInfo.of(model)
    block = _blocks(model, info.n_layers)[layer]
    parts = {name.rpartition(".")[2]: m.weight.double() for name, m in block.named_modules() if hasattr(m, "weight")}
    heads, groups, dim = info.heads, info.kv_heads, info.head_dim
    if "v_proj" in parts:
        value = parts["v_proj"]
    elif "qkv_proj" in parts:
        value = parts["qkv_proj"][-groups * dim :]
    elif "query_key_value" in parts:
        value = parts["query_key_value"].view(heads, 3, dim, -1)[:, 2].flatten(0, 1)
    else:
        raise UnsupportedModel(
            f"{type(model).__name__} names its value projection otherwise: give value_maps its weights"
        )
    out = next((parts[n] for n in ("o_proj", "out_proj", "dense") if n in parts), None)
    if out is None or value.shape[0] != groups * dim or out.shape[1] != heads * dim:
        raise UnsupportedModel(
            f"{type(model).__name__} names or shapes its output projection otherwise: give value_maps its weights"
        )
    return value.view(groups, dim, -1), out.view(-1, heads, dim).transpose(0, 1)


def _gram(w_v: Tensor, w_o: Tensor) -> Tensor:
    """tr(V_g' V_h), [heads, heads], without ever holding a map; one head at a time, since all pairs would be large."""
    w_v = w_v.repeat_interleave(w_o.shape[0] // w_v.shape[0], 0)
    rows = [((w_o.mT @ o) * (w_v @ v.mT)).sum((1, 2)) for o, v in zip(w_o, w_v, strict=True)]
    return torch.stack(rows)

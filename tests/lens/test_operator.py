"""The operator view against recurrences, automatic differentiation and the theorem of Eckart and Young."""

import pytest
import torch
from models import tiny

from foveal.errors import InputError
from foveal.lens.operator import (
    apply,
    as_heads,
    attention_operator,
    by_lag,
    effective_rank,
    heads_floor,
    interaction,
    interaction_rank,
    nonnegative,
    operator_of,
    path_norms,
    projections,
    ssm_kernels,
    value_maps,
)
from foveal.model_info import ModelInfo

D = torch.double


def model_of_state(state=3, dim=4, length=7):
    a = 0.9 * torch.linalg.qr(torch.randn(state, state, dtype=D)).Q  # not symmetric
    b, c = torch.randn(state, dim, dtype=D), torch.randn(dim, state, dtype=D)
    return a, b, c, ssm_kernels(a, b, c, length)


def recurrence(a, b, c, x):
    s, out = torch.zeros(a.shape[0], dtype=D), []
    for u in x:
        s = a @ s + b @ u
        out.append(c @ s)
    return torch.stack(out)


def test_operator_of_a_state_space_model():
    a, b, c, kernels = model_of_state()
    x = torch.randn(7, 4, dtype=D)
    w = by_lag(kernels)
    torch.testing.assert_close(apply(w, x), recurrence(a, b, c, x), atol=1e-12, rtol=0)
    torch.testing.assert_close(operator_of(lambda u: recurrence(a, b, c, u), x), w, atol=1e-12, rtol=0)


def test_attention_with_given_weights():
    weights = torch.rand(3, 6, 6, dtype=D).tril()
    w_v, w_o = torch.randn(3, 2, 5, dtype=D), torch.randn(3, 4, 2, dtype=D)
    maps = value_maps(w_v, w_o)

    def layer(x):
        return sum(w_o[h] @ (weights[h] @ (x @ w_v[h].T)).T for h in range(3)).T

    x = torch.randn(6, 5, dtype=D)
    w = attention_operator(weights, maps)
    torch.testing.assert_close(operator_of(layer, x), w, atol=1e-12, rtol=0)
    assert interaction_rank(w) == interaction_rank(maps) == 3
    assert interaction_rank(attention_operator(weights[:1], maps[:1])) == 1
    # where heads share their weights, they act as one
    assert interaction_rank(attention_operator(weights[:1].expand(3, -1, -1), maps)) == 1


def test_grouped_values_are_shared():
    w_v, w_o = torch.randn(2, 3, 5, dtype=D), torch.randn(6, 4, 3, dtype=D)
    maps = value_maps(w_v, w_o)
    torch.testing.assert_close(maps[2], w_o[2] @ w_v[0])
    torch.testing.assert_close(maps[3], w_o[3] @ w_v[1])


def test_heads_equivalence():
    kernels = model_of_state()[3]
    assert interaction_rank(kernels) == 3
    weights, maps = as_heads(kernels)
    assert maps.shape == (3, 4, 4)
    torch.testing.assert_close(torch.einsum("th,hoe->toe", weights, maps), kernels, atol=1e-12, rtol=0)
    weights, maps = as_heads(kernels, 2)
    gap = (torch.einsum("th,hoe->toe", weights, maps) - kernels).square().sum()
    torch.testing.assert_close(gap, heads_floor(kernels, 2), atol=1e-12, rtol=1e-9)
    assert gap > 1e-3
    assert heads_floor(kernels, 3) < 1e-20
    # no other two heads come closer: alternating least squares from random starts ends at the floor
    flat = kernels.flatten(1)
    right = torch.randn(2, 16, dtype=D)
    for _ in range(2000):
        left = flat @ torch.linalg.pinv(right)
        right = torch.linalg.pinv(left) @ flat
    torch.testing.assert_close((flat - left @ right).square().sum(), heads_floor(kernels, 2), atol=1e-9, rtol=1e-4)
    with pytest.raises(InputError, match="at most 7"):
        as_heads(kernels, 8)


def test_nonnegative_weights_give_the_same():
    weights, maps = as_heads(model_of_state()[3])
    both, more = nonnegative(weights, maps)
    assert both.min() >= 0
    assert (weights < 0).any()
    torch.testing.assert_close(
        torch.einsum("th,hoe->toe", both, more), torch.einsum("th,hoe->toe", weights, maps), atol=1e-12, rtol=0
    )


def test_rank_counts_and_entropy():
    base = torch.randn(4, 3, 3, dtype=D)
    mixed = torch.einsum("nh,hoe->noe", torch.randn(50, 4, dtype=D), base)
    assert interaction_rank(mixed) == 4
    orthogonal = torch.eye(9, dtype=D)[:5].view(5, 3, 3)
    assert effective_rank(orthogonal) == pytest.approx(5)
    assert effective_rank(base[:1].expand(6, -1, -1)) == pytest.approx(1)


def test_gradients_fade_in_a_state_space_model_and_not_in_a_copying_head():
    n, rho = 40, 0.8
    a = rho * torch.linalg.qr(torch.randn(3, 3, dtype=D)).Q
    eye = torch.eye(3, dtype=D)
    norms = path_norms(by_lag(ssm_kernels(a, eye, eye, n)))
    torch.testing.assert_close(norms, rho ** torch.arange(n, dtype=D), atol=1e-12, rtol=1e-9)
    for back in (1, 39):
        weights = torch.full((1, n, n), 1e-9, dtype=D).tril()
        weights[0, -1, n - 1 - back] = 1
        value = torch.randn(1, 3, 3, dtype=D)
        found = path_norms(attention_operator(weights, value))
        torch.testing.assert_close(found[back], torch.linalg.matrix_norm(value[0], ord=2))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gemma2"])
def test_interaction_of_a_model(family):
    model = tiny(family)
    info = ModelInfo.of(model)
    rank, effective = interaction(model)
    for i in info.layers:
        maps = value_maps(*projections(model, i))
        assert int(rank.value[i]) == interaction_rank(maps) == info.heads
        assert float(effective.value[i]) == pytest.approx(effective_rank(maps), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_projections_make_the_layers_output(family):
    """The maps applied to the layer's own input, with the weights transformers reports, give the layer's own output."""
    model = tiny(family, fresh=True)
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 15)[None]
    attention = next(m for name, m in model.named_modules() if name.endswith(("self_attn", "layers.0.attention")))
    seen = {}

    def note(module, args, kwargs, output):
        seen["x"] = kwargs.get("hidden_states", args[0] if args else None)[0]
        seen["y"] = output[0][0]

    handle = attention.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[0][0]
    handle.remove()
    got = apply(attention_operator(weights.double(), value_maps(*projections(model, 0))), seen["x"].double())
    bias = seen["y"].double() - got  # biases of values and of the output add the same vector to every row
    torch.testing.assert_close(bias, bias[:1].expand_as(bias), atol=1e-5, rtol=1e-4)
    if family != "gpt_neox":
        assert bias.abs().max() < 1e-5


def test_twin_heads_count_once():
    model = tiny("llama", fresh=True)
    attention = model.get_decoder().layers[1].self_attn
    with torch.no_grad():  # head 2 writes twice what head 0 writes, of the same values
        attention.o_proj.weight[:, 32:48] = 2 * attention.o_proj.weight[:, :16]
    assert int(interaction(model)[0].value[1]) == ModelInfo.of(model).heads - 1


def test_refusals():
    with pytest.raises(InputError, match="expected a"):
        ssm_kernels(torch.eye(3), torch.ones(2, 4), torch.ones(4, 3), 5)

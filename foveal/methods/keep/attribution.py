"""How much each token of a sentence contributed to what a model made of it: GlobEnc and DecompX.

GlobEnc (Modarressi et al. 2022): per layer, the norm of what token j adds to output i through attention, residual and both layer norms
(the MLP counts through the second norm only), rows made to sum to one, multiplied up over the layers. DecompX (Modarressi et al. 2023):
every hidden state is kept as a sum over the tokens it came from, through all layers and the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModel
from ...method import Method
from .scoring import attention

_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
_TOGETHER = 4  # sentences of about one length read as one batch: more of them are mostly padding


# ---------------------------------------------------------------------- the causal model itself


@dataclass(frozen=True, eq=False)
class Mixing(Method):
    """Writes down how each layer mixes: for each sequence weights [heads, n, n] and values [kv_heads, n, head_dim]."""

    record: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def after(self, step) -> None:
        self.record.setdefault(step.layer, []).append((attention(step)[0].float(), step.v_new[0].float()))


def projections(decoder: nn.Module) -> dict[int, nn.Module]:
    """The output projection of each attention layer."""
    found = {}
    for module in decoder.modules():
        layer = getattr(module, "layer_idx", None)
        last = next((getattr(module, n) for n in _PROJECTIONS if isinstance(getattr(module, n, None), nn.Linear)), None)
        if layer is not None and last is not None:
            found.setdefault(layer, last)
    return found


def by_the_model(prompt, sentences: Sequence[Sequence[int]]) -> list[Tensor]:
    """GlobEnc of a causal model on sentences of token ids: for each token its share in the state of the sentence's last one, [n].

    Such models norm before they mix, so that a layer's sum is the residual stream itself. Raises UnsupportedModel where an attention layer
    has no linear output projection.
    """
    info, last = prompt.model, projections(prompt.model.model.get_decoder())
    if missing := [i for i in info.layers if i not in last]:
        raise UnsupportedModel(
            f"attention of layers {missing} ends in no linear projection, so nothing can be attributed to its tokens"
        )
    scores: dict[int, Tensor] = {}
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    for at in range(0, len(sentences), _TOGETHER):
        some = [sentences[i] for i in order[at : at + _TOGETHER]]
        sizes = [len(s) for s in some]
        ids = torch.zeros(len(some), max(sizes), dtype=torch.long, device=prompt.ids.device)
        mask = torch.zeros_like(ids)
        for b, s in enumerate(some):
            ids[b, -len(s) :], mask[b, -len(s) :] = torch.tensor(s), 1
        probe = Mixing()
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        out = prompt.run(ids, probe, attention_mask=mask, position_ids=places, output_hidden_states=True)
        for b, n in enumerate(sizes):
            total = torch.eye(n, device=ids.device)
            for layer in info.layers:
                weights, values = probe.record[layer][b]
                states = out.hidden_states[layer][b, -n:].float()
                total = shares(weights, values, last[layer].weight.float(), states) @ total
            scores[order[at + b]] = total[-1]
    return [scores[i] for i in range(len(sentences))]


def shares(weights: Tensor, values: Tensor, projection: Tensor, states: Tensor) -> Tensor:
    """Row i: the part each token has in the sum of attention and residual at i, by the norm of what it adds; rows sum to one, [n, n].

    weights [heads, n, n], values [kv_heads, n, head_dim], projection [size, heads * head_dim], states [n, size] before the layer.
    """
    return _normed(_added(weights, values, projection) + _itself(states))


def _added(weights: Tensor, values: Tensor, projection: Tensor) -> Tensor:
    """What token j adds to position i through attention, [n, n, size]."""
    heads = weights.shape[0]
    values = values.repeat_interleave(heads // values.shape[0], 0)
    out = torch.einsum("hjd,ehd->hje", values, projection.unflatten(1, (heads, -1)))
    return torch.einsum("hij,hje->ije", weights, out)


def _itself(states: Tensor) -> Tensor:
    return torch.eye(len(states), device=states.device)[..., None] * states[:, None]


def _normed(parts: Tensor) -> Tensor:
    size = parts.norm(dim=-1)
    return size / size.sum(-1, keepdim=True)


# ---------------------------------------------------------------------- encoders with a classifier (BERT, ELECTRA, RoBERTa, XLM-R)


class Layer:
    """One layer of such an encoder on one sentence: inputs x [n, size], true weights, and the states it makes."""

    def __init__(self, layer: nn.Module, heads: int, x: Tensor):
        own, self.x = layer.attention.self, x
        self.out, self.norm1 = layer.attention.output.dense, layer.attention.output.LayerNorm
        self.up, self.act = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
        self.down, self.norm2 = layer.output.dense, layer.output.LayerNorm
        self.value = own.value
        q, k = (f(x).unflatten(-1, (heads, -1)).transpose(0, 1) for f in (own.query, own.key))
        self.weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        self.v = self.value(x).unflatten(-1, (heads, -1)).transpose(0, 1)
        self.summed = self.out((self.weights @ self.v).transpose(0, 1).flatten(1)) + x
        self.between = self.norm1(self.summed)
        self.hidden = self.up(self.between)
        self.after = self.down(self.act(self.hidden)) + self.between
        self.y = self.norm2(self.after)


def _layers(encoder) -> tuple[nn.Module, int]:
    base = encoder.base_model
    try:
        first = base.encoder.layer[0]
        _ = (
            first.attention.self.query,
            first.attention.output.LayerNorm,
            first.intermediate.intermediate_act_fn,
            first.output.LayerNorm,
        )
        return base.encoder.layer, encoder.config.num_attention_heads
    except (AttributeError, IndexError) as error:
        raise UnsupportedModel(
            f"expected an encoder laid out as BERT, ELECTRA, RoBERTa or XLM-R are, got {type(encoder).__name__}: name another"
        ) from error


def _scaled(parts: Tensor, summed: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A layer norm without its bias, on the parts of a sum: parts [n, k, size], summed [n, size]."""
    deviation = (summed.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()[:, None]
    return (parts - parts.mean(-1, keepdim=True)) / deviation * norm.weight


@torch.no_grad()
def globenc(encoder, ids: Tensor) -> Tensor:
    """Share of each token of ids [n] in the encoder's state of the first one, [n]; sums to one."""
    layers, heads = _layers(encoder)
    x = encoder.base_model(input_ids=ids[None], output_hidden_states=True).hidden_states[0][0]
    total = torch.eye(len(ids), device=ids.device)
    for module in layers:
        layer = Layer(module, heads, x)
        parts = _scaled(_added(layer.weights, layer.v, layer.out.weight) + _itself(x), layer.summed, layer.norm1)
        total = _normed(_scaled(parts, layer.after, layer.norm2)) @ total
        x = layer.y
    return total[0]


def with_bias(parts: Tensor, bias: Tensor | None) -> Tensor:
    """A bias shared out among the parts [n, k, size] by how much each points along it, |b . x|."""
    if bias is None:
        return parts
    share = (parts @ bias).abs()
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-30)
    return parts + share[..., None] * bias


def _linear(parts: Tensor, module: nn.Linear) -> Tensor:
    return with_bias(parts @ module.weight.mT, module.bias)


def _bent(parts: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """An activation by its slope from zero, f(z) / z, on every part."""
    slope = torch.where(before.abs() > 1e-12, after / before, 0.0)
    return parts * slope[:, None]


@torch.no_grad()
def decompx(encoder, ids: Tensor, label: int = 0) -> tuple[Tensor, Tensor]:
    """What each token of ids [n] contributes to the logit of a class, [n], and to the last hidden states, [n, n, size]: both are sums.

    Biases are shared out where the released code does so: those of values and of the projection after attention together, once the residual
    has been added; in the first layer, where tokens are not yet mixed, a token's value brings its own.
    """
    layers, heads = _layers(encoder)
    x = encoder.base_model(input_ids=ids[None], output_hidden_states=True).hidden_states[0][0]
    parts = _itself(x)
    for n, module in enumerate(layers):
        layer = Layer(module, heads, x)
        values, bias = parts @ layer.value.weight.mT, layer.out.bias
        if n == 0:
            values = _itself(layer.value(x))
        elif layer.value.bias is not None:
            bias = bias + layer.out.weight @ layer.value.bias
        mixed = torch.einsum("hij,jkhd->ikhd", layer.weights, values.unflatten(-1, (heads, -1))).flatten(2)
        parts = with_bias(mixed @ layer.out.weight.mT + parts, bias)
        parts = with_bias(_scaled(parts, layer.summed, layer.norm1), layer.norm1.bias)
        inner = _bent(_linear(parts, layer.up), layer.hidden, layer.act(layer.hidden))
        parts = with_bias(_scaled(_linear(inner, layer.down) + parts, layer.after, layer.norm2), layer.norm2.bias)
        x = layer.y
    return _classified(encoder, parts[:1], x[:1])[0, :, label], parts


def _classified(encoder, parts: Tensor, first: Tensor) -> Tensor:
    """The first token's parts [1, k, size] through the classifier, [1, k, labels]."""
    head, pooler = encoder.classifier, getattr(encoder.base_model, "pooler", None)
    if isinstance(head, nn.Linear) and pooler is not None:
        dense, bend, last = pooler.dense, pooler.activation, head
    elif hasattr(head, "out_proj"):
        dense, bend, last = head.dense, getattr(head, "activation", torch.tanh), head.out_proj
    else:
        raise UnsupportedModel(
            f"expected a classifier of one hidden layer, got {type(head).__name__}: name another encoder"
        )
    before = dense(first)
    return _linear(_bent(_linear(parts, dense), before, bend(before)), last)

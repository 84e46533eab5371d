"""How much each token of a sentence contributed to what a model made of it: GlobEnc and DecompX.

GlobEnc (Modarressi et al. 2022): per layer, the norm of what token j adds to output i through attention, residual and both layer norms
(the MLP counts through the second norm only), rows made to sum to one, multiplied up over the layers. DecompX (Modarressi et al. 2023):
every hidden state is kept as a sum over the tokens it came from, through all layers and the classifier.

Of what is added only norms are wanted, and |sum over heads of a_h u_h|^2 = a' G a, where u_h is what the token's value becomes behind the
projection of head h and G [heads, heads] holds the inner products of its u_h: one small matrix for each token, not a vector for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ...errors import UnsupportedModel
from ...method import Method, Out
from ...ops.dense import wide
from ...ops.ragged import Logit, attend_padded
from ...prefill import TILE
from .words import packed

_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
_ROW = 8192  # tokens of sentences that are read in one row, at most
_STATES = {"cpu": 1 << 28, "cuda": 1 << 30}  # and numbers in the hidden states that all layers leave of it
_SHORT = {"cpu": 16, "cuda": 128}  # up to here sentences are one group: padding costs a GPU less than another launch


# ---------------------------------------------------------------------- norms of what is added


def _tile(device: torch.device, numbers: int) -> int:
    """How many pieces of so many numbers are computed at once."""
    return max(1, TILE.get(device.type, TILE["cpu"]) // numbers)


def grams(values: Tensor, projection: Tensor) -> Tensor:
    """Inner products of what each token's values become behind the projection of each head, [n, heads, heads].

    values [kv_heads, n, head_dim], projection [size, heads * head_dim].
    """
    kv_heads, n, dim = values.shape
    by_head = projection.mT.unflatten(0, (kv_heads, -1, dim)).to(wide(projection.dtype))
    values = values.to(by_head.dtype)[:, None]
    step, found = _tile(values.device, projection.numel() // dim), []
    for start in range(0, n, step):
        u = (values[:, :, start : start + step] @ by_head).flatten(0, 1).transpose(0, 1)
        found.append(u @ u.mT)
    return torch.cat(found)


def added(weights: Tensor, grams: Tensor) -> Tensor:
    """The norm of what token j adds to position i through attention, [texts, queries, n].

    weights [texts, n, queries, heads], grams [texts, n, heads, heads].
    """
    return ((weights @ grams) * weights).sum(-1).clamp_(min=0).sqrt_().mT


def itself(own: Tensor, values: Tensor, projection: Tensor, states: Tensor) -> Tensor:
    """The norm of what each token has of its own in the sum, [n]: states [n, size] and its value by its own weights, own [n, heads]."""
    projection = projection.to(own.dtype)
    values = values.to(own.dtype).transpose(0, 1)
    values = (own.unflatten(1, (values.shape[1], -1))[..., None] * values[:, :, None]).flatten(1)
    return torch.addmm(states.to(own.dtype), values, projection.mT).norm(dim=-1)


def shares(weights: Tensor, values: Tensor, projection: Tensor, states: Tensor) -> Tensor:
    """Row i: the part each token has in the sum of attention and residual at i, by the norm of what it adds; rows sum to one, [n, n].

    weights [heads, n, n], values [kv_heads, n, head_dim], projection [size, heads * head_dim], states [n, size] before the layer.
    """
    size = added(weights.permute(2, 1, 0)[None], grams(values, projection)[None])[0]
    own = weights.diagonal(dim1=1, dim2=2).mT
    size.diagonal().copy_(itself(own, values, projection, states))
    return size / size.sum(-1, keepdim=True)


# ---------------------------------------------------------------------- the causal model itself


class Group(NamedTuple):
    """Sentences of about one length in a row. numbers: which; at: columns of their tokens, [sentences, n], filled up with the last one;
    last: where in `at` the last token stands, [sentences, 1]."""

    numbers: list[int]
    at: Tensor
    last: Tensor


class Row:
    """Sentences one after the other. back: where in the flattened groups, one after the other, each column of the row stands, [length]."""

    def __init__(self, sizes: Sequence[int], device: torch.device):
        self.sizes, self.groups = sizes, []
        ends = torch.tensor(sizes).cumsum(0)
        least, classes = _SHORT.get(device.type, _SHORT["cpu"]), {}
        for i, n in enumerate(sizes):
            classes.setdefault((max(n, least) - 1).bit_length(), []).append(i)
        back, before = torch.empty(sum(sizes), dtype=torch.long), 0
        for members in classes.values():
            last = torch.tensor([sizes[i] for i in members])[:, None] - 1
            place = torch.arange(int(last.max()) + 1)
            at = ends[members, None] - 1 - last + place.minimum(last)
            real = place <= last
            back[at[real]] = real.flatten().nonzero()[:, 0] + before
            before += at.numel()
            self.groups.append(Group(members, at.to(device), last.to(device)))
        self.back = back.to(device)


class Mixed(NamedTuple):
    """How one layer mixed a row: values [kv_heads, length, head_dim], own weights [length, heads], `added` of each group."""

    values: Tensor
    own: Tensor
    sizes: list[Tensor]


@dataclass(frozen=True, eq=False)
class Mixing(Method):
    """Every sentence of a row attends to itself alone; writes down for each layer how it mixes."""

    row: Row
    last: dict[int, nn.Module]
    record: dict[int, Mixed] = field(default_factory=dict)

    def attend(self, step, selection, bias) -> Out:
        gram = grams(step.v_new[0], self.last[step.layer].weight)
        found = [_mix(step, group.at, gram) for group in self.row.groups]
        out, own, sizes = zip(*found, strict=True)
        self.record[step.layer] = Mixed(step.v_new[0], torch.cat(own)[self.row.back], list(sizes))
        return Out(torch.cat(out, 1)[None, :, self.row.back])


def _mix(step, at: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences of one group: attention outputs [heads, sentences * n, head_dim], own weights [sentences * n, heads], what is `added`."""
    sentences, n = at.shape
    groups = (step.G, sentences, step.group_size)
    k, v = (x[0][:, at].flatten(0, 1) for x in (step.k_new, step.v_new))
    q = step.q[0][:, at].unflatten(0, (step.G, -1)).transpose(1, 2)
    gram, column = gram[at], torch.arange(n, device=at.device)
    rows, tiles = _tile(at.device, step.H * sentences * n), []
    for start in range(0, n, rows):
        some = q[..., start : start + rows, :]
        count = some.shape[3]
        later = (column > column[start : start + count, None]).repeat(step.group_size, 1)
        logit = _sinks_by_row(step.logit, groups, count)
        got = attend_padded(some.flatten(2, 3).flatten(0, 1), k, v, logit, hidden=later)
        weights = got.weights.view(*groups, count, n)
        own = weights[..., start : start + count].diagonal(dim1=-2, dim2=-1)
        size = added(weights.permute(1, 4, 3, 0, 2).flatten(3), gram)
        tiles.append((got.out.view(*groups, count, -1), own, size))
    out, own, size = (torch.cat(x, d) for x, d in zip(zip(*tiles, strict=True), (3, 3, 1), strict=True))
    return out.transpose(1, 2).flatten(0, 1).flatten(1, 2), own.permute(1, 3, 0, 2).flatten(2).flatten(0, 1), size


def _sinks_by_row(logit: Logit, groups: tuple[int, int, int], queries: int) -> Logit:
    if logit.sinks is None:
        return logit
    sinks = logit.sinks.view(groups[0], 1, groups[2], 1).expand(*groups, queries)
    return logit._replace(sinks=sinks.reshape(groups[0] * groups[1], -1))


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
    """GlobEnc of a causal model on sentences of token ids: for each token its share in the state of the sentence's last one, [n], on a CPU.

    Such models norm before they mix, so that a layer's sum is the residual stream itself. Sentences are read many in a row, unless the
    model has layers that would look beyond them (windows, recurrences). Raises UnsupportedModel where an attention layer has no linear
    output projection.
    """
    info, last = prompt.model, projections(prompt.model.model.get_decoder())
    if missing := [i for i in info.layers if i not in last]:
        raise UnsupportedModel(
            f"attention of layers {missing} ends in no linear projection, so nothing can be attributed to its tokens"
        )
    if not sentences:
        return []
    device, sizes = prompt.ids.device, [len(s) for s in sentences]
    size = last[info.layers[0]].out_features
    most = min(_ROW, _STATES.get(device.type, _STATES["cpu"]) // (size * info.n_layers), info.max_positions or _ROW)
    alone = len(info.layers) < info.n_layers
    scores: list[Tensor] = []
    for run in [range(i, i + 1) for i in range(len(sizes))] if alone else packed(sizes, most):
        probe = Mixing(Row(sizes[run.start : run.stop], device), last)
        ids = torch.tensor([t for i in run for t in sentences[i]], device=device)[None]
        places = torch.cat([torch.arange(sizes[i]) for i in run]).to(device)[None]
        mask = torch.ones_like(ids)  # says that positions which begin anew are meant
        out = prompt.run(ids, probe, attention_mask=mask, position_ids=places, output_hidden_states=True)
        scores += _rolled_out(probe, [(i, out.hidden_states[i][0]) for i in info.layers])
    return scores


def _rolled_out(probe: Mixing, states: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """The last row of the product of all layers' shares for each sentence: a vector times one layer after the other, from the top."""
    row, scores = probe.row, {}
    lines = [one_hot(g.last, g.at.shape[1]).to(probe.record[states[0][0]].own.dtype) for g in row.groups]
    for layer, x in reversed(states):
        values, own, sizes = probe.record.pop(layer)
        alone = itself(own, values, probe.last[layer].weight, x)
        for i, (group, size) in enumerate(zip(row.groups, sizes, strict=True)):
            size.diagonal(dim1=1, dim2=2).copy_(alone[group.at])
            lines[i] = (lines[i] / size.sum(-1)[:, None]) @ size
    for group, line in zip(row.groups, lines, strict=True):
        for i, x in zip(group.numbers, line[:, 0].cpu(), strict=True):
            scores[i] = x[: row.sizes[i]]
    return [scores[i] for i in range(len(row.sizes))]


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


def _itself(states: Tensor) -> Tensor:
    """Every token is a part of itself alone, [n, n, size]."""
    return torch.eye(len(states), device=states.device)[..., None] * states[:, None]


def _scaled(parts: Tensor, summed: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A layer norm without its bias, on the parts of a sum: parts [n, k, size], summed [n, size]."""
    deviation = (summed.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()[:, None]
    return (parts - parts.mean(-1, keepdim=True)) / deviation * norm.weight


@torch.no_grad()
def globenc(encoder, ids: Tensor) -> Tensor:
    """Share of each token of ids [n] in the encoder's state of the first one, [n]; sums to one."""
    layers, heads = _layers(encoder)
    x = encoder.base_model(input_ids=ids[None], output_hidden_states=True).hidden_states[0][0]
    mixed = []
    for module in layers:
        layer = Layer(module, heads, x)
        projection, states = _through(layer.out.weight.mT, layer).mT, _through(x, layer)
        mixed.append(shares(layer.weights, layer.v, projection, states))
        x = layer.y
    total = mixed.pop()[:1]
    while mixed:
        total = total @ mixed.pop()
    return total[0]


def _through(parts: Tensor, layer: Layer) -> Tensor:
    """Parts [..., size] through both layer norms but for biases, and for the deviations, by which all parts of a row are divided alike."""
    for norm in (layer.norm1, layer.norm2):
        parts = (parts - parts.mean(-1, keepdim=True)) * norm.weight
    return parts


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

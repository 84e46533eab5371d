"""Is in-context learning like a step of finetuning? Their updates compared, and attention with momentum (ICLasGD 2022 [41])."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModel
from ..method import check_count, check_range
from ..model_info import ModelInfo
from ..ops.dense import spread
from ..tasks.task import encode
from .attribution.question import need_gradient
from .attribution.ranks import kendall
from .attribution.tap import Tap, output_projection, tapped
from .reasoning import logprob

Example = tuple[str, int]
"""A text and which of the labels it has."""

Progress = Callable[[str, float], None]

# ---------------------------------------------------------------------- the dual form


def implicit_update(keys: Tensor, values: Tensor) -> Tensor:
    """What demonstrations add to the weights of linear attention: the sum of outer products value x key, [..., value_dim, head_dim].

    keys [..., length, head_dim], values [..., length, value_dim]. Unnormalised linear attention over demonstrations and query text,
    applied to a query q, is (implicit_update(query text) + implicit_update(demonstrations)) q.
    """
    return values.mT @ keys


def momentum_values(v: Tensor, eta: float, chunk: int = 64) -> Tensor:
    """m_t = eta * (m_{t-1} + v_{t-1}): the sum over i < t of eta^(t - i) v_i, [..., length, value_dim] like v; O(length)."""
    check_range("eta", eta, 0, 1)
    check_count("chunk", chunk, 1)
    out, state = [], torch.zeros_like(v[..., :1, :])
    at = torch.arange(chunk, device=v.device)
    power = torch.full((chunk + 1,), float(eta), device=v.device, dtype=v.dtype) ** torch.arange(
        chunk + 1, device=v.device
    )
    inside = power[(at[:, None] - at).clamp(min=0)].tril(-1)
    for part in v.split(chunk, dim=-2):
        n = part.shape[-2]
        out.append(inside[:n, :n] @ part + power[:n, None] * state)  # state: m at the first position of this part
        state = power[n] * state + (power[1 : n + 1].flip(0)[:, None] * part).sum(-2, keepdim=True)
    return torch.cat(out, -2)


class _Momentum(Tap):
    def __init__(self, eta: float):
        self.eta = eta
        self.values: dict[int, Tensor] = {}

    def inputs(self, layer: int, q: Tensor, k: Tensor, v: Tensor, module: nn.Module):
        self.values[layer] = v
        return q, k, v

    def output(self, layer: int, z: Tensor, module: nn.Module) -> Tensor:
        moved = momentum_values(self.values.pop(layer), self.eta)[:, :, -z.shape[2] :]
        return z + spread(moved, z.shape[1]).to(z.dtype)


def momentum(model, eta: float) -> AbstractContextManager:
    """A `with` block in which every head adds momentum to its output: softmax attention + `momentum_values` of its values.

    eta: below 1 (the paper's value is not known); 0 is plain attention. It is meant for training a model with it: a model trained
    without gets worse. Prompts in batches must not be padded.
    """
    check_range("eta", eta, 0, 1)
    return tapped(model, _Momentum(eta))


# ---------------------------------------------------------------------- in-context learning beside finetuning


@dataclass(frozen=True, eq=False)
class InContext:
    """What demonstrations do to a model in its context, beside what one epoch of finetuning on them does.

    zero_shot, in_context, finetuned [items]: whether the answer was right.  update [layers]: cosine of the two changes of the attention
    output of the last token (SimAOU), mean over items; update_random: of the in-context change and a random vector.  attention [layers]:
    cosine of the logits of the last token over the query text, in context and finetuned (SimAM), mean over heads and items;
    attention_zero_shot: in context and zero-shot.  tokens, examples [layers]: Kendall's tau of the attention to demonstration tokens and
    of the finetuned model's pull towards them, single and summed by example; tokens_random: against random numbers.  NaN in layers
    without full attention.  rate: the learning rate that was used.
    """

    zero_shot: Tensor
    in_context: Tensor
    finetuned: Tensor
    update: Tensor
    update_random: Tensor
    attention: Tensor
    attention_zero_shot: Tensor
    tokens: Tensor
    tokens_random: Tensor
    examples: Tensor
    rate: float

    @property
    def recovered(self) -> float:
        """Rec2FTP: of the items that only finetuning put right, the share that the context puts right too; NaN where there are none."""
        gained = ~self.zero_shot & self.finetuned
        return float((gained & self.in_context).sum() / gained.sum()) if bool(gained.any()) else float("nan")


def compare_updates(
    model,
    tokenizer,
    demonstrations: Sequence[Example],
    items: Sequence[Example],
    labels: Sequence[str],
    *,
    template: str = "{text}\nLabel:",
    rates: Sequence[float] = (0.01,),
    validation: Sequence[Example] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> InContext:
    """Compare in-context learning with finetuning on the same demonstrations, item by item.

    demonstrations, items: (text, label) with labels as numbers of `labels`.  template: how a text is put; a demonstration is that, a
    space, its label and a newline.  Finetuning changes a copy: only the key and value projections, SGD, one pass over the demonstrations
    in order. rates: learning rates to try; the one with the lowest loss on `validation` (default: the demonstrations) is taken.
    The pull of finetuning towards a training token is the inner product of the test query with the query that token had when it was
    trained on (rotary positions applied, summed over heads).
    Costs three forward passes an item, and those of its labels.  Raises InputError for empty lists, unknown labels, quantised weights and
    gradients switched off; UnsupportedModel where queries, keys and values share one matrix.
    """
    task = _Task(model, tokenizer, demonstrations, items, labels, template)
    if not rates or any(not isinstance(r, (int, float)) or r <= 0 for r in rates):
        raise InputError(f"rates = {list(rates)}: expected learning rates above 0")
    need_gradient(model)
    tuned, trained, rate = _finetuned(model, task, rates, task.encoded(validation or demonstrations))
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[Tensor]] = {}
    right: dict[str, list[bool]] = {"zero": [], "context": [], "tuned": []}
    with torch.no_grad():
        for n, (ids, label) in enumerate(task.items):
            zero = _see(model, task, task.start + ids, len(ids))
            context = _see(model, task, task.context + ids, len(ids))
            after = _see(tuned, task, task.start + ids, len(ids))
            right["zero"].append(task.answer(model, task.start + ids) == label)
            right["context"].append(task.answer(model, task.context + ids) == label)
            right["tuned"].append(task.answer(tuned, task.start + ids) == label)
            for name, x in _compare(task, zero, context, after, trained, generator).items():
                sums.setdefault(name, []).append(x)
            if progress is not None:
                progress("items compared", (n + 1) / len(task.items))
    mean = {name: task.table(torch.stack(x).mean(0)) for name, x in sums.items()}
    verdicts = {k: torch.tensor(v) for k, v in right.items()}
    return InContext(verdicts["zero"], verdicts["context"], verdicts["tuned"], **mean, rate=rate)


class _Task:
    """Everything as token ids: the start (a beginning-of-sequence token, if any), demonstrations, the context they make, items."""

    def __init__(self, model, tokenizer, demonstrations, items, labels, template: str):
        if not demonstrations or not items:
            raise InputError("expected demonstrations and items, got an empty list: give at least one of each")
        if len(set(labels)) < 2:
            raise InputError(f"expected at least two labels, got {list(labels)}")
        if "{text}" not in template:
            raise InputError(f"template = {template!r}: expected it to hold {{text}}, where the text goes")
        self.info, self.tokenizer, self.template = ModelInfo.of(model), tokenizer, template
        self.tails = [encode(tokenizer, " " + label) for label in labels]
        plain = encode(tokenizer, "a")
        self.start = encode(tokenizer, "a", special=True)[: -len(plain)]
        self.items = self.encoded(items)
        self.training = [(x, self.tails[y]) for x, y in self.encoded(demonstrations)]
        self.context, self.spots, newline = [*self.start], [], encode(tokenizer, "\n")
        for x, tail in self.training:
            self.spots.append((len(self.context), len(self.context) + len(x) + len(tail)))
            self.context += x + tail + newline
        longest = len(self.context) + max(len(x) for x, _ in self.items) + max(map(len, self.tails))
        if self.info.max_positions is not None and longest > self.info.max_positions:
            raise InputError(
                f"demonstrations and item are {longest} tokens long but the model has {self.info.max_positions}: give fewer"
            )

    def encoded(self, examples: Sequence[Example]) -> list[tuple[list[int], int]]:
        for _, y in examples:
            if type(y) is not int or not 0 <= y < len(self.tails):
                raise InputError(f"label {y!r}: expected a number from 0 to {len(self.tails) - 1}")
        return [(encode(self.tokenizer, self.template.replace("{text}", text)), y) for text, y in examples]

    def answer(self, model, ids: list[int]) -> int:
        return int(torch.stack([logprob(model, ids, tail) for tail in self.tails]).argmax())

    def table(self, x: Tensor) -> Tensor:
        """[layers with full attention] to [layers], NaN in the others."""
        out = torch.full((self.info.n_layers,), torch.nan)
        out[list(self.info.layers)] = x.float()
        return out


def _trainable(model, info: ModelInfo) -> list[nn.Parameter]:
    """The key and value projections, and nothing else."""
    found = [
        p
        for name, m in model.named_modules()
        if name.rpartition(".")[2] in ("k_proj", "v_proj")
        for p in m.parameters()
    ]
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps queries, keys and values in one matrix (no k_proj and v_proj), so keys and values cannot be "
            "finetuned alone: use a model with separate projections"
        )
    return found


class _Queries(Tap):
    """Queries of every full-attention layer, [length, heads * head_dim]."""

    def __init__(self, layers: Sequence[int]):
        self.layers, self.kept = layers, {}

    def inputs(self, layer: int, q: Tensor, k: Tensor, v: Tensor, module: nn.Module):
        if layer in self.layers:
            self.kept[layer] = q[0].detach().transpose(0, 1).flatten(1).float()
        return q, k, v


def _finetuned(model, task: _Task, rates: Sequence[float], validation) -> tuple[nn.Module, dict[int, Tensor], float]:
    """The copy with the lowest validation loss, the queries its training tokens had [tokens, heads * head_dim], and its rate."""
    best = None
    for rate in rates:
        tuned = copy.deepcopy(model).requires_grad_(False)
        weights = [p.requires_grad_() for p in _trainable(tuned, task.info)]
        optimizer = torch.optim.SGD(weights, lr=rate)
        seen: dict[int, list[Tensor]] = {i: [] for i in task.info.layers}
        for ids, tail in task.training:
            with tapped(tuned, _Queries(task.info.layers)) as tap:
                loss = _loss(tuned, task.start + ids, tail)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for i, x in tap.kept.items():
                seen[i].append(x[len(task.start) :])
        tuned.requires_grad_(False)
        with torch.no_grad():
            score = sum(float(_loss(tuned, task.start + x, task.tails[y])) for x, y in validation)
        if math.isfinite(score) and (best is None or score < best[0]):
            best = score, tuned, {i: torch.cat(x) for i, x in seen.items()}, rate
    if best is None:
        raise InputError(f"finetuning diverged at all of {list(rates)}: give smaller learning rates")
    return best[1:]


def _loss(model, ids: list[int], tail: list[int]) -> Tensor:
    """Mean cross-entropy of the label's tokens."""
    x = torch.tensor([ids + tail], device=model.device)
    logits = model(x, use_cache=False, logits_to_keep=len(tail) + 1).logits[0, -len(tail) - 1 : -1]
    return F.cross_entropy(logits.float(), x[0, -len(tail) :])


class _Last(Tap):
    """Of the last query: its vector, its logits over the query text, its attention, and the attention output of its layer."""

    def __init__(self, model, layers: Sequence[int], tail: int):
        self.model, self.layers, self.tail = model, layers, tail
        self.query: dict[int, Tensor] = {}
        self.near: dict[int, Tensor] = {}
        self.weight: dict[int, Tensor] = {}
        self.out: dict[int, Tensor] = {}

    def inputs(self, layer: int, q: Tensor, k: Tensor, v: Tensor, module: nn.Module):
        if layer in self.layers:
            scale = getattr(module, "scaling", None) or q.shape[-1] ** -0.5
            logits = (q[:, :, -1:] @ spread(k, q.shape[1]).mT)[0, :, 0].float() * scale
            self.query[layer] = q[0, :, -1].flatten().float()
            self.near[layer], self.weight[layer] = logits[:, -self.tail :], logits.softmax(-1).mean(0)
        return q, k, v

    def output(self, layer: int, z: Tensor, module: nn.Module) -> Tensor:
        if layer in self.layers:
            self.out[layer] = output_projection(self.model, module)(z[:, :, -1].flatten(1))[0].float()
        return z


def _see(model, task: _Task, ids: list[int], tail: int) -> _Last:
    with tapped(model, _Last(model, task.info.layers, tail)) as tap:
        model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    return tap


def _compare(
    task: _Task, zero: _Last, context: _Last, after: _Last, trained: dict[int, Tensor], generator
) -> dict[str, Tensor]:
    """Every similarity of one item, [layers with full attention]."""
    found: dict[str, list[float]] = {}
    for i in task.info.layers:
        for name, x in _of_layer(task, i, zero, context, after, trained[i], generator):
            found.setdefault(name, []).append(x)
    return {name: torch.tensor(x, dtype=torch.double) for name, x in found.items()}


def _of_layer(task, i: int, zero, context, after, trained: Tensor, generator) -> Iterator[tuple[str, float]]:
    unit = [F.normalize(x.out[i], dim=0) for x in (zero, context, after)]
    by_context, by_tuning = unit[1] - unit[0], unit[2] - unit[0]
    noise = torch.randn(len(by_context), generator=generator).to(by_context)
    yield "update", float(F.cosine_similarity(by_context, by_tuning, dim=0))
    yield "update_random", float(F.cosine_similarity(by_context, noise, dim=0))
    yield "attention", float(F.cosine_similarity(context.near[i], after.near[i], dim=-1).mean())
    yield "attention_zero_shot", float(F.cosine_similarity(context.near[i], zero.near[i], dim=-1).mean())
    pull = (
        (trained @ after.query[i]).double().cpu()
    )  # before its softmax: the order is the same, and nothing underflows
    looked = torch.cat([context.weight[i][b:e] for b, e in task.spots]).softmax(0).cpu()
    yield "tokens", kendall(looked, pull)
    yield "tokens_random", kendall(looked, torch.rand(len(looked), generator=generator))
    sizes = [e - b for b, e in task.spots]
    summed = (
        torch.stack([x.sum() for x in looked.split(sizes)]),
        torch.stack([x.logsumexp(0) for x in pull.split(sizes)]),
    )
    yield "examples", kendall(*summed) if len(sizes) > 1 else float("nan")

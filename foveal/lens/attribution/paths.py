"""Runs of paired prompts with some parts of the model held at values of another run: what path patching is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...data.prompts import Contrast
from ...errors import InputError, UnsupportedModel
from ...method import check_count
from ...model_info import ModelInfo
from ..ranking import Pairs
from ..reading import _blocks
from .tap import Tap, tapped


@dataclass
class Record:
    """One plain run: head outputs z[layer] [batch, heads, length, value_dim], MLP outputs, embeddings, logits [batch, vocabulary]."""

    z: dict[int, Tensor]
    mlps: list[Tensor]
    embeds: Tensor | None
    logits: Tensor

    def last(self) -> Record:
        """The same of the last position alone."""
        z = {i: x[:, :, -1:] for i, x in self.z.items()}
        return Record(
            z, [m[:, -1:] for m in self.mlps], None if self.embeds is None else self.embeds[:, -1:], self.logits
        )


class _Recorder(Tap):
    def __init__(self):
        self.z: dict[int, Tensor] = {}

    def output(self, layer: int, z: Tensor, module: nn.Module) -> Tensor:
        self.z[layer] = z
        return z


class _Frozen(Tap):
    """Every head gives its clean output, senders their corrupt one; notes what arrives at the receivers."""

    def __init__(self, one: Record, other: Record, senders: set, receivers: Pairs | None, part: str, at: slice):
        self.one, self.other, self.senders, self.at = one, other, senders, at
        self.receivers, self.part = receivers or (), part
        self.arrived: dict[tuple[int, int], Tensor] = {}

    def inputs(self, layer: int, q: Tensor, k: Tensor, v: Tensor, module: nn.Module):
        x = {"q": q, "k": k, "v": v}.get(self.part)
        for i, h in self.receivers:
            if i == layer and x is not None:
                self.arrived[i, h] = x[:, _own(h, q, x), self.at]
        return q, k, v

    def output(self, layer: int, z: Tensor, module: nn.Module) -> Tensor:
        for i, h in self.receivers:
            if i == layer and self.part == "z":
                self.arrived[i, h] = z[:, h, self.at]
        z = z.clone()
        z[:, :, self.at] = self.one.z[layer][:, :, self.at]
        for i, h in self.senders:
            if i == layer:
                z[:, h, self.at] = self.other.z[layer][:, h, self.at]
        return z


class _Put(Tap):
    """Puts what arrived at the receivers into a run that is otherwise untouched."""

    def __init__(self, arrived: dict[tuple[int, int], Tensor], part: str, at: slice):
        self.arrived, self.part, self.at = arrived, part, at

    def inputs(self, layer: int, q: Tensor, k: Tensor, v: Tensor, module: nn.Module):
        x = {"q": q, "k": k, "v": v}
        if self.part in x:
            x[self.part] = self._put(layer, x[self.part], q)
        return x["q"], x["k"], x["v"]

    def output(self, layer: int, z: Tensor, module: nn.Module) -> Tensor:
        return self._put(layer, z, z) if self.part == "z" else z

    def _put(self, layer: int, x: Tensor, q: Tensor) -> Tensor:
        mine = [(h, a) for (i, h), a in self.arrived.items() if i == layer]
        x = x.clone() if mine else x
        for h, a in mine:
            x[:, _own(h, q, x), self.at] = a
        return x


def _own(head: int, q: Tensor, x: Tensor) -> int:
    """A query head's place among the heads of x."""
    return head // (q.shape[1] // x.shape[1])


class Runs:
    """Prompts in batches on one model, and the ways they are run."""

    def __init__(self, model, pairs: Sequence[Contrast], batch: int):
        check_count("batch", batch, 1)
        if not pairs:
            raise InputError("expected at least one pair of prompts, got none")
        if any(len(p.clean) != len(p.corrupt) for p in pairs):
            raise InputError(
                "expected clean and corrupt prompts of equal length in tokens: pairs are patched position by position"
            )
        self.model, self.info = model, ModelInfo.of(model)
        by_length: dict[int, list[Contrast]] = {}
        for p in pairs:
            by_length.setdefault(len(p.clean), []).append(p)
        self.batches = [
            self._tensors(group[i : i + batch]) for group in by_length.values() for i in range(0, len(group), batch)
        ]

    def _tensors(self, pairs: list[Contrast]) -> tuple[Tensor, ...]:
        columns = (
            [p.clean for p in pairs],
            [p.corrupt for p in pairs],
            [p.answer for p in pairs],
            [p.distractor for p in pairs],
        )
        return tuple(torch.tensor(c, device=self.model.device) for c in columns)

    @staticmethod
    def metric(logits: Tensor, answer: Tensor, distractor: Tensor) -> Tensor:
        """logit(answer) - logit(distractor), [batch]."""
        both = torch.stack([answer, distractor], 1)
        found = logits.double().gather(1, both)
        return found[:, 0] - found[:, 1]

    @staticmethod
    def difference(clean: float, corrupt: float) -> float:
        if abs(corrupt - clean) < 1e-6:
            raise InputError(
                "corrupting the prompts does not change the answer, so there is nothing to trace: use other pairs or another model"
            )
        return corrupt - clean

    def logits(self, x: Tensor, first: int = 0) -> Tensor:
        """Of the last position, [batch, vocabulary]; first: the position of the first token."""
        positions = torch.arange(first, first + x.shape[1], device=x.device).expand(len(x), -1)
        return self.model(input_ids=x, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]

    def record(self, x: Tensor, mlps: bool) -> Record:
        """A plain run with all its parts."""
        found: dict[str, list[Tensor]] = {"mlps": [], "embeds": []}
        with ExitStack() as hooks, tapped(self.model, _Recorder()) as tap:
            if mlps:
                for m in _mlps(self.model, self.info):
                    hooks.enter_context(_hook(m, lambda out: found["mlps"].append(out)))
                hooks.enter_context(_hook(self.model.get_input_embeddings(), lambda out: found["embeds"].append(out)))
            logits = self.logits(x)
        return Record(tap.z, found["mlps"], next(iter(found["embeds"]), None), logits)

    @staticmethod
    def last_alone(receivers: Pairs | None, part: str) -> bool:
        """Whether the last position can run by itself: with every head held it hears nothing of the others; z of receivers needs them."""
        return receivers is None or part != "z"

    def through(
        self,
        x: Tensor,
        one: Record,
        other: Record,
        senders: set,
        receivers: Pairs | None,
        part: str,
        position: int | None,
    ) -> Tensor:
        """Logits when only the receivers hear that the senders changed."""
        n = x.shape[1]
        at = slice(None) if position is None else slice(position % n, position % n + 1)
        alone = at == slice(n - 1, n) and self.last_alone(receivers, part)
        held, told, place = (one.last(), other.last(), slice(None)) if alone else (one, other, at)
        with ExitStack() as hooks, tapped(self.model, _Frozen(held, told, senders, receivers, part, place)) as tap:
            for m, value in zip(_mlps(self.model, self.info) if held.mlps else (), held.mlps, strict=True):
                hooks.enter_context(_hook(m, lambda out, value=value: value))
            if held.embeds is not None:
                hooks.enter_context(_hook(self.model.get_input_embeddings(), lambda out: held.embeds))
            logits = self.logits(x[:, -1:], n - 1) if alone else self.logits(x)
        if receivers is None:
            return logits
        with tapped(self.model, _Put(tap.arrived, part, at)):
            return self.logits(x)


@contextmanager
def _hook(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, the module's output is what `change` returns, if anything."""

    def hook(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        new = change(first)
        if new is None:
            return output
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _mlps(model, info: ModelInfo) -> list[nn.Module]:
    names = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn")
    found = [next((getattr(b, n) for n in names if hasattr(b, n)), None) for b in _blocks(model, info.n_layers)]
    if None in found:
        raise UnsupportedModel(
            f"no MLP was found in layer {found.index(None)} of {type(model).__name__}: leave MLPs unfrozen"
        )
    return found


def check_heads(heads: Pairs, info: ModelInfo) -> Pairs:
    for layer, head in heads:
        if not (0 <= layer < info.n_layers and 0 <= head < info.heads):
            raise InputError(
                f"there is no head {head} in layer {layer}: expected a layer below {info.n_layers} and a head below {info.heads}"
            )
    if not heads:
        raise InputError("expected at least one receiving head, got none")
    return tuple((int(i), int(h)) for i, h in heads)

"""Which attention grows sinks, on a toy task and on text: softmax, softmax with a learned key, sigmoid (2024 [18])."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import book
from ...method import check_count, check_range
from .backcopy import Backcopy, losses
from .lab import FOUND, Curves, Finding, Lab, Tick, arm, at_least, at_most, descend, lab
from .model import Tiny, optimiser

PAPER = "When Attention Sink Emerges in Language Models: An Empirical View (2024) [18]"
ARMS = {"softmax": ("softmax", False), "key-bias": ("softmax", True), "sigmoid": ("sigmoid", False)}
"""Weights, and whether each head has a learned key without a value."""


@cache
def characters() -> tuple[Tensor, int]:
    """(*Moby-Dick* as ids of characters, how many different ones)."""
    text = book()
    rank = {c: i for i, (c, _) in enumerate(Counter(text).most_common())}
    return torch.tensor([rank[c] for c in text]), len(rank)


def windows(batch: int, length: int) -> Tensor:
    """Stretches of the text that begin anywhere, [batch, length]."""
    ids, _ = characters()
    return ids[torch.randint(len(ids) - length, (batch, 1)) + torch.arange(length)]


@torch.no_grad()
def rates(model: Tiny, x: Tensor, threshold: float) -> tuple[Tensor, float]:
    """(sink rate of every position [length], that of the learned key): the share of texts, layers and heads in which its mean attention
    from the queries that see it exceeds `threshold`."""
    _, seen = model(x)
    sees = torch.arange(x.shape[1], 0, -1, device=x.device)
    sunk = [(s.weights.sum(2) / sees > threshold).float().mean((0, 1)) for s in seen]
    spare = [(s.spare.mean(-1) > threshold).float().mean() for s in seen]
    return torch.stack(sunk).mean(0), float(torch.stack(spare).mean())


@lab(
    "sink-variants",
    paper=PAPER,
    about="where a head must sleep, softmax sinks; a learned key takes the sink over, sigmoid needs none",
)
@dataclass(frozen=True)
class SinkVariants(Backcopy):
    """The arms of ARMS on Bigram-Backcopy [91], one layer, AdamW; sinks measured as the paper does, over all queries.

    rate: AdamW's (3e-3).  threshold: the paper's (0.3).
    """

    rate: float = 3e-3
    threshold: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, 0, 1)

    def experiment(self, device: torch.device, tick: Tick) -> tuple[list[Finding], Curves]:
        """Sink rates of the first token and of the learned key, where the task was learned."""
        curves: Curves = {}
        found: list[Finding] = []
        for n, (title, (weights, spare)) in enumerate(ARMS.items()):
            how = arm(tick, n, len(ARMS))
            model, more = self.trained(1, weights, "adam", self.rate, device, how, title, spare)
            curves |= more
            x = self.probe(device)
            by_position, key = rates(model, x, self.threshold)
            learned = f"{title}: loss at triggers, nats (the task is learned)"
            found.append(at_most(learned, losses(model, x).triggers, 0.1))
            first = f"{title}: sink rate of the first token", float(by_position[0])
            found.append(at_least(*first, 0.9, FOUND) if title == "softmax" else at_most(*first, 0.05, FOUND))
            if spare:
                found.append(at_least(f"{title}: sink rate of the learned key", key, 0.9, FOUND))
        return found, curves


@lab(
    "sink-emergence",
    paper=PAPER,
    about="on text, softmax grows a sink on the first token, a learned key draws it away, sigmoid has none",
)
@dataclass(frozen=True)
class SinkEmergence(Lab):
    """Character models of one book with two layers of four heads, one for each kind of attention, AdamW.

    The paper trains 60M parameters on 5B tokens of 2,048 positions and measures texts of 64 tokens with threshold 0.3; the sizes here
    fit a CPU, the measure is the paper's. rate: AdamW's, in all arms.
    """

    steps: int = 2500
    length: int = 64
    width: int = 64
    batch: int = 16
    layers: int = 2
    heads: int = 4
    rate: float = 3e-3
    threshold: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "width", "batch", "layers", "heads"):
            check_count(name, getattr(self, name), 1)
        check_range("threshold", self.threshold, 0, 1)

    def experiment(self, device: torch.device, tick: Tick) -> tuple[list[Finding], Curves]:
        """Sink rates of the first token, and of the learned key."""
        curves: Curves = {}
        rate, spare, best = {}, {}, {}
        for n, title in enumerate(ARMS):
            model, more = self._trained(title, device, arm(tick, n, len(ARMS)))
            curves |= more
            torch.manual_seed(self.seed + 1)
            by_position, spare[title] = rates(model, windows(100, self.length).to(device), self.threshold)
            rate[title], best[title] = float(by_position[0]), float(by_position[1:-4].max())
        found = [
            at_least("softmax: sink rate of the first token", rate["softmax"], 0.1, FOUND),
            at_most("softmax: sink rate of any later position", best["softmax"], 0.05),
            at_most("key-bias: sink rate of the first token", rate["key-bias"], 0.02, FOUND),
            at_least("key-bias: sink rate of the learned key", spare["key-bias"], 0.1, FOUND),
            at_most("sigmoid: sink rate of the first token", rate["sigmoid"], 0.02, FOUND),
        ]
        return found, curves

    def _trained(self, title: str, device: torch.device, tick: Tick) -> tuple[Tiny, Curves]:
        torch.manual_seed(self.seed)
        weights, spare = ARMS[title]
        model = Tiny(characters()[1], self.length, self.width, self.layers, self.heads, weights, spare).to(device)
        by = optimiser("adam", model.parameters(), self.rate)
        decay = torch.optim.lr_scheduler.LambdaLR(by, lambda s: min(1.0, (s + 1) / 50))
        probe = windows(50, self.length).to(device)

        def loss_of() -> Tensor:
            x = windows(self.batch, self.length + 1).to(device)
            logits, _ = model(x[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())

        sink = lambda: (float(rates(model, probe, self.threshold)[0][0]),)
        return model, descend(title, self.steps, by, decay, loss_of, tick, ("sink",), sink)

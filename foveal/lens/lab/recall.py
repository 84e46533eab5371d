"""Multi-query associative recall: softmax, linear and normalised attention at equal size of queries and keys (2024 [57])."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...method import check_count
from ...tasks.mqar import IGNORED, mqar, mqar_accuracy
from .lab import FOUND, Curves, Finding, Lab, Tick, arm, at_least, at_most, descend, lab


def softmax(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    """Causal weights [batch, length, length]; the gate is not used."""
    n = q.shape[1]
    logits = q @ k.mT / math.sqrt(q.shape[2])
    return logits.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -torch.inf).softmax(-1)


def linear(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    """Features elu + 1, rows that sum to one; the gate is not used."""
    products = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    return products / products.sum(-1, keepdim=True)


def normalised(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    """The paper's: no features, over exp of a number learned from the token, gate [batch, length]."""
    return (q @ k.mT).tril() / gate.exp()[..., None]


MIXERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": softmax,
    "linear": linear,
    "normalised": normalised,
}


class Mixer(nn.Module):
    """One head: queries and keys of `key_dim`, values of the model's width."""

    def __init__(self, width: int, key_dim: int, kind: str):
        super().__init__()
        self.weigh = MIXERS[kind]
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, key_dim, bias=False), nn.Linear(width, key_dim, bias=False)
        self.value, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 1)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        return h + self.out(self.weigh(self.query(x), self.key(x), self.gate(x)[..., 0]) @ self.value(x))


class Model(nn.Module):
    """Two mixers with a network after each, learned positions: tokens [batch, length] to logits [batch, places, vocabulary] at `at`."""

    def __init__(self, vocabulary: int, length: int, width: int, key_dim: int, kind: str):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        network = lambda: nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.mixers = nn.ModuleList(Mixer(width, key_dim, kind) for _ in range(2))
        self.networks = nn.ModuleList(network() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.5)

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        h = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for mixer, network in zip(self.mixers, self.networks, strict=True):
            h = mixer(h)
            h = h + network(h)
        return self.head(self.norm(h.gather(1, at[..., None].expand(-1, -1, h.shape[2]))))


@lab(
    "recall",
    paper="Understanding the differences in Foundation Models: Attention, SSMs, and RNNs (Dynamical Systems Framework) (2024) [57]",
    about="how many dimensions of queries and keys a mixer needs to recall values: softmax few, linear attention many",
)
@dataclass(frozen=True)
class Recall(Lab):
    """Two layers, one head, trained by AdamW with a rate that falls to zero on `prompts` prompts; accuracy on 2,000 others.

    small, large: the two sizes of queries and keys compared.  The paper has 8,192 tokens, 64 positions with 4 pairs (up to 512 with 64),
    widths of 64 to 512 and 100,000 prompts seen 64 times; the defaults are a smaller task.
    """

    steps: int = 1000
    length: int = 32
    pairs: int = 8
    vocabulary: int = 64
    width: int = 64
    small: int = 8
    large: int = 64
    prompts: int = 20_000
    batch: int = 32
    rate: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "small", "prompts", "batch"):
            check_count(name, getattr(self, name), 1)
        check_count("large", self.large, self.small)
        mqar(1, self.length, self.pairs, self.vocabulary)  # raises where these do not go together

    def experiment(self, device: torch.device, tick: Tick) -> tuple[list[Finding], Curves]:
        """Accuracy of each mixer at both sizes."""
        curves: Curves = {}
        right: dict[tuple[str, int], float] = {}
        train, test = self._data(self.prompts, 2 * self.seed, device), self._data(2000, 2 * self.seed + 1, device)
        arms = [(kind, size) for kind in MIXERS for size in (self.small, self.large)]
        for n, (kind, size) in enumerate(arms):
            right[kind, size], more = self._trained(kind, size, train, test, arm(tick, n, len(arms)))
            curves |= more
        curves["accuracy." + ",".join(f"{kind} {size}" for kind, size in arms)] = list(right.values())
        chance = 2 / self.vocabulary
        ahead = right["normalised", self.small] - right["linear", self.small]
        behind = right["softmax", self.large] - right["normalised", self.large]
        grown = right["linear", self.large] - right["linear", self.small]
        found = [
            at_least(f"softmax, keys of {self.small}: accuracy", right["softmax", self.small], 0.99, FOUND),
            at_least(f"linear, keys of {self.large}: accuracy over chance", right["linear", self.large] / chance, 2.0),
            at_least(f"linear: accuracy with keys of {self.large} less that with {self.small}", grown, 0.0, FOUND),
            at_least(f"keys of {self.small}: accuracy of normalised less that of linear", ahead, 0.0, FOUND),
            at_most(f"keys of {self.large}: accuracy of softmax less that of normalised", behind, 0.05, FOUND),
        ]
        return found, curves

    def _data(self, count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [count, length], and of the queries the positions and the values due there, [count, pairs]."""
        tokens, labels = mqar(count, self.length, self.pairs, self.vocabulary, seed=seed)
        at = (labels != IGNORED).nonzero()[:, 1].view(count, self.pairs)
        return tokens.to(device), at.to(device), labels.gather(1, at).to(device)

    def _trained(self, kind: str, size: int, train, test, tick: Tick) -> tuple[float, Curves]:
        torch.manual_seed(self.seed)
        device = train[0].device
        model = Model(self.vocabulary, self.length, self.width, size, kind).to(device)
        by = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=0.1)
        decay = torch.optim.lr_scheduler.LinearLR(by, 1.0, 1e-3, self.steps)

        def loss_of() -> Tensor:
            chosen = torch.randint(self.prompts, (self.batch,)).to(device)
            tokens, at, values = (x[chosen] for x in train)
            return F.cross_entropy(model(tokens, at).flatten(0, 1), values.flatten())

        curves = descend(f"{kind} {size}", self.steps, by, decay, loss_of, tick)
        with torch.no_grad():
            return mqar_accuracy(model(*test[:2]), test[2]), curves

"""Random keys: the baseline that any way of choosing has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...method import Budget, check_budget, check_count, method
from ...verify import Claim, Falls, StaysNear
from .scoring import PromptKeeper, check_rolling, newest


@method(
    "random-keep",
    paper="Uniformly random keys: the lower bound that keeping methods are measured against",
    claim=Claim(
        "With the sinks and the newest keys in place, random keys keep the tone of a text but not its facts.",
        number="a baseline: no paper",
        experiments=(
            StaysNear("random-keep(budget=0.25)", "perplexity", within=0.3),
            Falls("random-keep(budget=0.25)", "needle", by=0.5),
        ),
    ),
)
@dataclass(frozen=True)
class RandomKeep(PromptKeeper):
    """When the prompt has been read, keep the first `sink` tokens, the newest `recent` and, of the rest, keys drawn at random for each
    KV head; `budget` keys a KV head in all. What comes later is appended.

    A draw depends on the seed, the layer, the KV head and the token's place in its text and on nothing else: batches, devices and
    chunks change nothing. `sink` and `recent` are those of StreamingLLM and SnapKV, so that the difference to them lies in the choice
    alone. rolling: compress after every piece that is read, be it a chunk or a later turn. Original positions.
    """

    budget: Budget = 1024
    sink: int = 4
    recent: int = 32
    seed: int = 0
    rolling: bool = False

    example = {"budget": 0.5, "recent": 8}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("sink", self.sink)
        check_count("recent", self.recent)
        check_count("seed", self.seed)
        check_rolling(self.rolling)

    def score(self, step, size: int) -> Tensor:
        recent = min(self.recent, size)
        safe = newest(step, recent) | (step.token < min(self.sink, size - recent))
        head = torch.arange(step.G, device=step.device)[:, None]
        draw = _mixed(_mixed(_mixed(_mixed(self.seed) ^ step.layer) ^ head) ^ step.token.long())
        return draw.double().masked_fill(safe, torch.inf)


def _mixed(x):
    """32 bits in, 32 well mixed bits out (the finaliser of a multiply-and-shift hash); an int or a tensor of int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B + 0x9E3779B9) & 0xFFFFFFFF
    return x ^ (x >> 16)

"""Scale or ablate single heads: the controls behind every claim about what a head does."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Method, method
from ...selection import All
from ...store import FAR
from ...verify import Claim, HeadsCarry, Same

Heads = tuple[tuple[int, int], ...]

TILE = 1 << 22  # weights held at once
SOME = ((0, 1), (2, 0))  # heads that every model of three layers has


def _by_layer(name: str, heads: Heads, model) -> dict[int, list[int]]:
    out = defaultdict(list)
    for pair in heads:
        layer, head = pair
        if layer not in model.layers or not 0 <= head < model.heads:
            raise InputError(
                f"{name}: there is no head {head} in layer {layer}; expected (layer, head) with a layer in {list(model.layers)} and a "
                f"head in 0..{model.heads - 1}"
            )
        out[layer].append(head)
    return dict(out)


def _check(name: str, heads: Heads) -> None:
    pairs = isinstance(heads, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in heads)
    if not pairs or any(type(i) is not int for p in heads for i in p):
        raise InputError(f"{name}: heads = {heads!r} should be a tuple of (layer, head) pairs")


@method(
    "scale-heads",
    paper="Head scaling, the plainest intervention on a head",
    claim=Claim(
        "A gain of one changes nothing; a gain of zero is the head taken out.",
        experiments=(
            Same(f"scale-heads(heads={SOME}, gain=1.0)", unlike=f"scale-heads(heads={SOME}, gain=0.5)"),
            Same(
                f"scale-heads(heads={SOME}, gain=0.0)",
                unlike=f"scale-heads(heads={SOME}, gain=0.5)",
                other=f"ablate(heads={SOME}, mode='zero')",
            ),
        ),
    ),
)
@dataclass(frozen=True)
class ScaleHeads(Method):
    """Multiply the outputs of some query heads by `gain` before the output projection. heads: pairs (layer, head)."""

    heads: Heads = ()
    gain: float = 1.0

    neutral = {"heads": ((0, 0),), "gain": 1.0}
    example = {"heads": ((0, 1),), "gain": 0.25}

    def __post_init__(self) -> None:
        _check("scale-heads", self.heads)
        if isinstance(self.gain, bool) or not isinstance(self.gain, (int, float)):
            raise InputError(f"gain = {self.gain!r}: expected a number")

    def setup(self, model) -> dict[int, Tensor]:
        plan = {}
        for layer, heads in _by_layer("scale-heads", self.heads, model).items():
            gains = torch.ones(1, model.heads, 1, 1)
            gains[:, heads] = self.gain
            plan[layer] = gains.to(model.model.device)
        return plan

    def where(self, model) -> tuple[int, ...]:
        return tuple({layer for layer, _ in self.heads})

    def mix(self, step, out: Tensor) -> Tensor:
        return out * step.plan[step.layer].to(out.dtype)


@method(
    "ablate",
    paper="Retrieval Head Mechanistically Explains Long-Context Factuality (2024) [51]",
    claim=Claim(
        "Masking the top retrieval heads breaks needle recall where masking as many random heads does not.",
        number="Llama-2-7B-80K: without its top 30 retrieval heads recall collapses, without 30 random ones nothing changes",
        experiments=(HeadsCarry("needle", by=0.4, count=20, able=0.8, length=512),),
    ),
)
@dataclass(frozen=True)
class Ablate(Method):
    """Take some query heads out. mode "uniform" (the papers' masking): the head attends equally to every key it could see; "zero": its
    output is zero. heads: pairs (layer, head).
    """

    heads: Heads = ()
    mode: str = "uniform"

    neutral = {"heads": ()}
    example = {"heads": ((0, 1), (1, 0))}

    def __post_init__(self) -> None:
        _check("ablate", self.heads)
        if self.mode not in ("uniform", "zero"):
            raise InputError(f"mode = {self.mode!r}: expected 'uniform' or 'zero'")

    def setup(self, model) -> dict[int, Tensor]:
        chosen = _by_layer("ablate", self.heads, model)
        return {layer: torch.tensor(heads, device=model.model.device) for layer, heads in chosen.items()}

    def where(self, model) -> tuple[int, ...]:
        return tuple({layer for layer, _ in self.heads})

    def mix(self, step, out: Tensor) -> Tensor:
        heads = step.plan[step.layer]
        out = out.clone()
        out[:, heads] = 0.0 if self.mode == "zero" else self._uniform(step, out.dtype)[:, heads]
        return out

    def _uniform(self, step, dtype: torch.dtype) -> Tensor:
        """The mean of the values each query can see, [batch, heads, length, value_dim]."""
        if not isinstance(step.visible, All) or "mass" in step.store.specs:
            return self._uniform_of_some(step).to(dtype)
        valid = step.token != FAR
        total, count = step.store.values().float().sum(2, keepdim=True), valid.sum(2)[..., None, None]
        later = step.v_new.float().flip(2).cumsum(2).flip(2) - step.v_new.float()  # new values after each query
        ahead = torch.arange(step.L - 1, -1, -1, device=step.device)[:, None]
        return step.per_head((total - later) / (count - ahead)).to(dtype)

    @staticmethod
    def _uniform_of_some(step) -> Tensor:
        """Under a selection or with merged keys: every visible key counts as often as it stands for a token."""
        values, store = step.per_head(step.store.values()).float(), step.store
        mass = step.per_head(store.plane("mass"))[:, :, None] if "mass" in store.specs else 1.0
        size, tiles = max(1, TILE // (step.H * step.T)), []
        for start in range(0, step.L, size):
            weights = (step.scores(start=start, stop=min(start + size, step.L)) > -math.inf) * mass
            tiles.append(weights @ values / weights.sum(-1, keepdim=True).clamp(min=1))
        return torch.cat(tiles, 2)

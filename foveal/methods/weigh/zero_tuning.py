"""ZeroTuning: scale the attention to the first token; since it is a sink, one number flattens or sharpens everything else."""

import math
from dataclasses import dataclass

import torch

from ...edits import Bias
from ...errors import InputError
from ...method import Method, check_range, method
from ...verify import Chosen, Claim, Same


@method(
    "zero-tuning",
    paper="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training (2025) [125]",
    claim=Claim(
        "Scaling the initial token's attention in well-chosen heads raises accuracy without training; 1 changes nothing.",
        number="Llama-3.1-8B: classification 59.6 to 71.4 %, multiple choice 58.8 to 61.5 %",
        experiments=(
            Same("zero-tuning(gamma=1.0)", unlike="zero-tuning(gamma=2.0)"),
            Chosen(tuple(f"zero-tuning(gamma={g})" for g in (0.3, 0.6, 1.5, 3.0)), "needle", by=0.02),
        ),
        setting="gamma alone is chosen, for all heads and layers, and the task is recall from a text",
    ),
)
@dataclass(frozen=True)
class ZeroTuning(Method):
    """Multiply the weight of token 0 by `gamma` and renormalise, which is exactly a logit bias of ln(gamma) on its key.

    gamma > 1 flattens the attention among the other tokens, gamma < 1 sharpens it (paper: about 2 to 4 for classification, 0.3 to 0.8 for
    question answering). heads, layers: query heads (their index in every layer) and layers it acts on; None is all of them. The paper
    chooses 40 to 70 % of the heads on labelled data, in shallow and middle layers.
    """

    gamma: float = 2.0
    heads: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None

    neutral = {"gamma": 1.0}
    example = {"gamma": 3.0}

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0)
        if self.gamma == 0:
            raise InputError("gamma = 0 would hide the first token: expected a positive number")
        for name in ("heads", "layers"):
            chosen = getattr(self, name)
            if chosen is not None and (not isinstance(chosen, tuple) or any(type(i) is not int for i in chosen)):
                raise InputError(f"{name} = {chosen!r}: expected a tuple of numbers, or None for all")

    def setup(self, model) -> torch.Tensor:
        for name, chosen, count in (("heads", self.heads, model.heads), ("layers", self.layers, model.n_layers)):
            if any(not 0 <= i < count for i in chosen or ()):
                raise InputError(f"{name} = {chosen}: this model has {name} 0..{count - 1}")
        bias = torch.zeros(model.heads)
        bias[list(self.heads) if self.heads is not None else slice(None)] = math.log(self.gamma)
        return bias.to(model.model.device)

    def where(self, model) -> tuple[int, ...]:
        return tuple(i for i in model.layers if self.gamma != 1 and (self.layers is None or i in self.layers))

    def weigh(self, step) -> Bias:
        return Bias.at(step, 0, step.plan)

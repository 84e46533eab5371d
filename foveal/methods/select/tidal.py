"""TidalDecode: choose tokens in two layers of each step, and let the layers after them read the same tokens."""

from dataclasses import dataclass

import torch

from ... import ops
from ...errors import InputError
from ...method import Budget, Method, check_budget, check_count, method
from ...selection import All, Selection
from ...verify import Beats, Claim, StaysNear
from .lists import by_id, each_list, in_order, packed, plain_pages, tokens, top_ids


@method(
    "tidal",
    paper="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (2024) [132]",
    claim=Claim(
        "Needles in 10k and 100k tokens are found reading 128, as neighbouring layers want the same tokens; decode up to 2.1x faster.",
        number="Llama 3 8B 1048k: all needles at 10k and 100k tokens with 128 keys; Llama 2 7B: decode 2.1 times as fast (A100)",
        experiments=(
            StaysNear("tidal(budget=128)", "needle", within=0.05),
            Beats("tidal(budget=128)", "streaming-llm(budget=0.25)", "needle", by=0.3, at="reads"),
        ),
        setting="128 keys of 1,024 tokens; the window is given the keys that the dense layers read on top; accuracy alone",
    ),
)
@dataclass(frozen=True)
class Tidal(Method):
    """In decode, the layers up to the first of `pick` are dense; each layer of `pick` is dense too and then chooses `budget` tokens by
    this step's logits, and the layers after it read only those. Chosen anew for every token. Prefill is dense, nothing is dropped.

    One set serves all heads of a layer, by the sum of their attention weights (as in the paper's kernels; its accuracy runs keep
    one set per query head). `sink` first and `recent` newest tokens are always in it: the paper forces none, small models need them.
    pick: indices among the layers with full attention; default the third and the one at 12/32 of the depth (paper: 2 and 12 of 32).
    Not included: the optional correction that re-reads generated tokens densely.
    """

    budget: Budget = 256
    pick: tuple[int, ...] | None = None
    sink: int = 4
    recent: int = 16

    dense_prefill = True
    neutral = {"budget": 1.0, "pick": (0,)}
    example = {"budget": 0.5, "pick": (0,)}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("sink", self.sink)
        check_count("recent", self.recent)
        if self.pick is not None:
            if not isinstance(self.pick, tuple) or not self.pick:
                raise InputError(f"pick = {self.pick!r}: expected a tuple of layer indices, like (2, 12)")
            for layer in self.pick:
                check_count("pick", layer)

    def setup(self, model) -> tuple[int, ...]:
        layers = model.layers
        pick = (2, max(3, round(len(layers) * 12 / 32))) if self.pick is None else self.pick
        beyond = [i for i in pick if i >= len(layers)]
        if beyond and self.pick is not None:
            raise InputError(
                f"pick = {self.pick!r}: expected indices below {len(layers)}, the number of layers with full attention"
            )
        return tuple(layers[i] for i in pick if i < len(layers))

    def select(self, step) -> Selection:
        if not step.decode or step.layer in step.plan or "tidal" not in step.state:
            return All()
        return tokens(step, step.state["tidal"])

    def after(self, step) -> None:
        if not step.decode or step.layer not in step.plan:
            return
        most = max(2, step.most(self.budget))
        if most >= step.T:
            return
        allowed = step.budget(self.budget, least=2) - 1  # and the step's own key
        ids = self._choose(step, most - 1, allowed)
        step.state["tidal"] = ids[:, None].expand(-1, step.G, -1).contiguous()

    def _choose(self, step, k: int, allowed: int | torch.Tensor) -> torch.Tensor:
        """The tokens of the layers that follow, ascending [batch, k]."""
        pages = plain_pages(step)
        if pages is not None and in_order(step):
            ends = {"sink": self.sink, "recent": self.recent + 1}  # the step's own key is the newest
            count = each_list(allowed)
            return ops.vote_slots(packed(step), pages, step.logit, k, kv_heads=step.G, count=count, **ends)[0]
        votes = by_id(step, step.group(step.scores()[:, :, 0].softmax(-1), "sum"))
        index = torch.arange(votes.shape[1], device=step.device)
        own = step.q_token[:, :1]
        forced = (index < self.sink) | ((index >= own - self.recent) & (index < own))
        return top_ids(step, votes.masked_fill(forced, float("inf")), k, allowed)

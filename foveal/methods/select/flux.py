"""Flux Attention: a small router reads each prompt and says, layer by layer, whether full attention is worth it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...edits import Keep, Plane
from ...errors import InputError
from ...method import Method, check_count, iterate, method
from ...selection import All, Band, Selection
from ...verify import Claim, StaysNear
from .learned import learned_for, load_into

SINK, RECENT, POOL, WIDTH = 128, 2048, 100, 8
"""The paper's sinks and window of a sparse layer, tokens that are pooled at either end, and width of the routers."""
DECISIONS = ("routed", "full", "sparse")


class Router(nn.Module):
    """From a prompt's pooled query [.., dim] to the logits [.., 2] of sparse (0) and full (1) attention.

    width: of the widest layer, in units of dim; the others keep the paper's proportions 8 : 2 : 4 : 1. Starts as full attention for
    every input.
    """

    def __init__(self, dim: int, width: int = WIDTH):
        super().__init__()
        wide, pooled, hidden, last = (max(1, dim * width // n) for n in (1, 4, 2, 8))
        self.lift, self.lower = nn.Linear(dim, wide), nn.Linear(wide, pooled)
        self.v1, self.v2, self.v3 = nn.Linear(pooled, hidden), nn.Linear(hidden, last), nn.Linear(last, 2)
        with torch.no_grad():
            for layer in (self.v1, self.v2):
                nn.init.kaiming_uniform_(layer.weight)
                layer.bias.zero_()
            self.v3.weight.zero_()
            self.v3.bias.copy_(torch.tensor([0.0, 4.5]))

    def forward(self, u: Tensor) -> Tensor:
        act = nn.functional.silu
        return self.v3(act(self.v2(act(self.v1(self.lower(act(self.lift(u))))))))


def pooled_query(step, pool: int, stop: int | None = None) -> Tensor:
    """The mean query of all heads over the first and the last `pool` tokens, without rotary positions: [batch, head_dim], float32.

    stop: tokens of the prompt; what comes after it is not looked at (None: the whole step).
    """
    stop = step.L if stop is None else stop
    n = min(pool, stop)
    at = torch.cat([torch.arange(n), torch.arange(stop - n, stop)]).to(step.device, non_blocking=True)
    position = step.q_token[:, None, at].expand(-1, step.H, -1)
    return step.model.rope.unrotate(step.q[:, :, at], position, step.layer).float().mean((1, 2))


class Plan(NamedTuple):
    sink: int
    recent: int
    pool: int
    routers: dict[int, Router]


@method(
    "flux",
    paper="Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference (2026) [13]",
    claim=Claim(
        "Prompts up to 2.8x and decode up to 2.0x faster, at quality close to the full model on long-context and mathematics tasks.",
        number="Qwen3 4B and 8B, Llama 3.1 8B: up to 2.8 times as fast in prefill, 2.0 times in decode",
        experiments=(
            StaysNear("flux", "needle", within=0.05, query_aware=True),
            StaysNear("flux", "perplexity", within=0.05),
        ),
        setting="routers of the default model, trained at 1,024 tokens with windows scaled; the question in the prompt; accuracy alone",
    ),
)
@dataclass(frozen=True)
class Flux(Method):
    """Once for each prompt every layer decides: full attention, or `sink` first and `recent` newest tokens for all its heads. A sparse
    layer lets go of all other keys when the prompt has been read, and stays sparse for the rest of the text.

    The decision is that of a router, one a layer, which sees the mean query over the prompt's ends before rotary positions. The routers
    are trained for a model, which stays as it is: `python -m foveal.methods.select.flux_train`. routers: a file it wrote, instead of
    those that ship or the user's own. sink, recent: None = as the routers were trained (the paper: 128 and 2,048).
    decision: "routed", or as controls the same for all layers, "full" or "sparse". One number a layer is read back from the device.
    The released demonstration drops nothing and decodes densely; the paper's speed of decode asks for what is done here.
    """

    decision: str = "routed"
    sink: int | None = None
    recent: int | None = None
    routers: str | None = None

    planes = {"flux": Plane(0, torch.bool)}
    needs = frozenset({"whole_prompt"})
    neutral = {"decision": "full"}
    example = {"decision": "sparse", "sink": 2, "recent": 8}

    def __post_init__(self) -> None:
        if self.decision not in DECISIONS:
            raise InputError(f"decision = {self.decision!r}: expected one of {', '.join(DECISIONS)}")
        if self.sink is not None:
            check_count("sink", self.sink)
        if self.recent is not None:
            check_count("recent", self.recent, 2)

    def setup(self, model) -> Plan:
        given = {"sink": self.sink, "recent": self.recent}
        given = {name: x for name, x in given.items() if x is not None}
        if self.decision != "routed":
            return Plan(**({"sink": SINK, "recent": RECENT} | given), pool=POOL, routers={})
        _ = model.rope  # raises now where queries have no positions to be taken off
        found = learned_for(model.model, "flux", self.routers)
        routers = {}
        for i in model.layers:
            router = load_into(Router(model.head_dim, found.settings["width"]), found.weights, f"{i}.")
            routers[i] = router.to(model.model.device)
        trained = {name: found.settings[name] for name in ("sink", "recent", "pool")}
        return Plan(**(trained | given), routers=routers)

    def select(self, step) -> Selection:
        if step.decode:
            return All()  # the store holds just what a query may see
        step.scratch["flux"] = self._is_sparse(step)
        sink, recent = step.plan.sink, step.plan.recent
        return Band(sink, recent) if step.scratch["flux"] and sink + recent < step.seen() else All()

    def _is_sparse(self, step) -> bool:
        if step.pass_.counts[0] > 0:  # a text that goes on keeps the decision of its prompt
            return bool(step.store.plane("flux").any())
        if self.decision != "routed":
            return self.decision == "sparse"
        return int(step.plan.routers[step.layer](pooled_query(step, step.plan.pool)).argmax()) == 0

    def keep(self, step) -> Keep | None:
        sink, held = (
            step.plan.sink,
            step.plan.sink + step.plan.recent - 1,
        )  # with the next token, what its query may see
        if step.decode:
            return self._let_one_go(step, sink, held)
        if not step.scratch["flux"]:
            return None
        step.store.set("flux", torch.ones(1, step.G, step.T, dtype=torch.bool, device=step.device))
        if held >= step.T:
            return None
        return step.keep_ends(sink, held - sink)

    def _let_one_go(self, step, sink: int, held: int) -> Keep | None:
        known = self._known(step, held)
        if known is False:
            return None
        sparse = step.store.plane("flux").any(2)
        step.store.set("flux", sparse[..., None].expand(-1, -1, step.T))  # new keys carry the decision on
        oldest = step.oldest(after=sink)
        if known:
            return step.evict_one(oldest, held)
        return Keep(drop=oldest.where(sparse & (step.store.len > held), -1), optional=True)

    @staticmethod
    def _known(step, held: int) -> bool | None:
        """Whether every row is sparse, or none is, where the host can tell by their lengths without asking the device."""
        n, keepers = step.store.uniform, [m for m in iterate(step.pass_.session.method) if "keep" in m.asks]
        if n is None or not step.pass_.same or len(keepers) > 1:
            return None
        if n < step.pass_.counts[0] + 1:  # keys have left
            return True
        return False if n > held + 1 else None  # a sparse row would have let keys go

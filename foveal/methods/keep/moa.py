"""MoA: every head has a window of its own, whose width grows with the text by a rule found for that head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...edits import Keep, Leave
from ...errors import InputError
from ...method import Method, check_count, method
from ...selection import All, Band, Selection
from ...verify import Beats, Claim, StaysNear
from .by_head import check_share
from .moa_search import Rule, search
from .profiles import profile_for


class Plan(NamedTuple):
    """The rule of each query head by layer, and on the device, [2, layers, heads]: floor(alpha / block) and beta."""

    rules: dict[int, list[Rule]]
    lines: Tensor


@method(
    "moa",
    paper="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (2024) [19]",
    claim=Claim(
        "At half of the attention, windows made to measure for each head reach 3.9 times as far as a uniform window of the same cost.",
        number="Vicuna 7B and 13B at 50 %: 3.9 times the effective context, retrieval 1.5 to 7.1 times as good, loss within 5 %",
        experiments=(
            StaysNear("moa(budget=0.5)", "needle", within=0.05),
            Beats("moa(budget=0.5)", "moa(budget=0.5, plan='uniform')", "needle", by=0.2),
        ),
        setting="1.5 times the recall of a window that holds the newer half of the needles is about 0.2 more; speed is not measured",
    ),
)
@dataclass(frozen=True)
class MoA(Method):
    """A head sees the first `block` tokens and the newest n * block, with n = floor(floor(alpha / block) + beta * tokens / block), at
    least 1; its (alpha, beta) comes from a search over the head's influence profile, such that all heads together keep the share
    `budget` of the cache at every length. The KV heads hold what their query heads may yet see, in prefill and in decode.

    plan: "profile" searches the profile of this model, measured once with `python -m foveal.methods.keep.moa_profile`; "uniform" gives
    every head the same window, the control. profile: a file with the measurement instead of the model's own. together: the query heads
    of a KV head share one rule, by the largest influence among them; False gives each its own and counts the budget over query heads,
    while a KV head holds the longest window of its heads, which may be more.

    Windows are counted in tokens from each query (the paper's mask moves in blocks). They follow the tokens seen so far (there the
    length of the prompt): in decode they go on growing, by a block at a time that fills with new tokens, and a prompt in chunks is read
    with the narrower windows of its beginnings. The reference's bound of two rules a layer, made for its kernels, is not needed here.
    Original positions.
    """

    budget: float = 0.5
    plan: str = "profile"
    block: int = 64
    together: bool = True
    profile: str | None = None

    neutral = {"budget": 1.0, "plan": "uniform"}
    example = {"budget": 0.5, "plan": "uniform", "block": 8}

    def __post_init__(self) -> None:
        check_share("moa", self.budget)
        if self.budget is None:
            raise InputError("budget = None: expected a share of the cache above 0 and up to 1.0")
        check_count("block", self.block, 1)
        if self.plan not in ("profile", "uniform"):
            raise InputError(f"plan = {self.plan!r}: expected 'profile' or 'uniform'")
        if not isinstance(self.together, bool):
            raise InputError(f"together = {self.together!r}: expected True or False")

    def setup(self, model) -> Plan:
        if self.budget == 1 or self.plan == "uniform":
            # the first block is kept beside the window, so a window of its own share would exceed the budget
            rule = Rule(0, 1.0) if self.budget == 1 else Rule(-self.block, self.budget)
            rules = {i: [rule] * model.heads for i in model.layers}
        else:
            found = profile_for(model.model, "moa", self.profile)
            rows = model.kv_heads if self.together else model.heads
            each = model.heads // rows
            rules = search(found, self.budget, rows, self.block, model.layers, model.max_positions)
            rules = {i: [rule for rule in row for _ in range(each)] for i, row in rules.items()}
        lines = [[(r.alpha // self.block, r.beta) for r in rules[i]] for i in model.layers]
        return Plan(rules, torch.tensor(lines, dtype=torch.float64).permute(2, 0, 1).to(model.model.device))

    def _windows(self, step, tokens: int) -> list[int]:
        """The newest tokens each query head sees, its own included, when so many have been seen."""
        return [rule.blocks(tokens, self.block) * self.block for rule in step.plan.rules[step.layer]]

    def _held(self, step, tokens: int) -> list[int]:
        """Keys each KV head holds after so many tokens: with the next token, the most one of its query heads sees."""
        windows = self._windows(step, tokens + 1)
        each = step.group_size
        return [self.block + max(windows[g * each : (g + 1) * each]) - 1 for g in range(step.G)]

    def _allowed(self, step) -> int | Tensor:
        """The same for a decode step: a number where it is one for all, else [batch, kv_heads]."""
        if step.pass_.on_device is None:
            held = [self._held(step, n + step.L) for n in step.pass_.counts]
            same = {n for row in held for n in row}
            return same.pop() if len(same) == 1 else torch.tensor(held).to(step.device, non_blocking=True)
        return step.once(("moa", self), lambda: self._each(step))[step.model.layers.index(step.layer)]

    def _each(self, step) -> Tensor:
        """The same in all layers, [layers, batch, kv_heads], from the counts on the device: a captured graph must not freeze the host's."""
        alpha, beta = step.plan.lines[:, :, None]
        blocks = (alpha + beta * (step.seen() + 1)[:, None] / self.block).floor().long().clamp(min=1)
        return self.block * (1 + blocks.unflatten(2, (step.G, -1)).amax(3)) - 1

    def select(self, step) -> Selection:
        if step.decode and self.together:
            return All()  # the store holds just that
        windows = [self._windows(step, n + step.L) for n in step.pass_.counts]
        if step.decode:
            return Windows(self.block, windows)
        if self.block + min(windows[0]) >= step.T:
            return All()
        return Band(self.block, windows[0])

    def keep(self, step) -> Keep | Leave | None:
        if step.decode:
            return Leave(self._allowed(step), after=self.block)
        held = self._held(step, step.pass_.counts[0] + step.L)
        if min(held) >= step.T:
            return None
        recent = torch.tensor(held, device=step.device)[:, None] - self.block
        return Keep(mask=(step.token < self.block) | (step.q_token[:, -1, None, None] - step.token < recent))


@dataclass(frozen=True)
class Windows(Selection):
    """Decode: the first `sink` tokens and the newest `recent[sequence][query head]`."""

    sink: int
    recent: Sequence[Sequence[int]]

    def mask(self, step, start: int, stop: int) -> torch.Tensor:
        recent = torch.tensor(self.recent, device=step.device)[:, :, None, None]
        token = step.per_head(step.token)[:, :, None]
        return (token < self.sink) | (step.q_token[:, None, start:stop, None] - token < recent)

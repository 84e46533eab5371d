"""Scissorhands: tokens that were important stay important; when the cache is full, drop those most often unimportant."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...edits import Keep, Plane
from ...errors import InputError
from ...method import Budget, Method, check_budget, check_count, check_range, method, tokens_of
from ...verify import BytesAtMost, Claim, StaysNear
from .scoring import check_rolling, exact


@method(
    "scissorhands",
    paper="Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time (2023) [156]",
    claim=Claim(
        "Up to 5x smaller caches without loss, because a step's important tokens were important before.",
        number="OPT-66B: no loss at 5x, and at 20x with 4 bits, on HellaSwag, MathQA, PIQA, WinoGrande; OPT-6B: about 2x on C4",
        experiments=(
            StaysNear("scissorhands(budget=0.5)", "perplexity", within=0.1),
            StaysNear("scissorhands(budget=0.2)", "perplexity", within=0.1),
            BytesAtMost("scissorhands(budget=0.2)", 0.22, "perplexity"),
            StaysNear("scissorhands(budget=0.5, bits=4)", "perplexity", within=0.1),
            BytesAtMost("scissorhands(budget=0.2, bits=4)", 0.08, "perplexity"),
        ),
        setting="next tokens of a novel, at 2x and at 5x; that important tokens stay so is not measured by itself",
    ),
)
@dataclass(frozen=True)
class Scissorhands(Method):
    """Count for each key how often its weight was below uniform (1 / visible keys); when more than `budget` keys are held, drop those
    with the highest counts: `drop` of the budget at once, or more where a prompt needs it. The newest `recent` always stay.

    The history is the last `window` queries of a prompt and every query since, kept as running counters; of a prompt in chunks, those of
    the last chunk that has so many, and what came after. Counts are summed over the query heads of a KV head. Between compressions the
    cache moves between budget - drop and budget; which step compresses is known from the lengths alone, so all others run in a captured
    graph (with `drop` = 0 none does).

    bits: 4 or 8 stores what is kept as codes of so many bits (the paper's 20x is 5x with 4 bits); scales, counters and token ids are extra.
    ramp: by what share of `budget` the last layer holds more and the first less, in a straight line between them (the paper gives later
    layers more, where importance persists less, by shares it reads off a plot); 0: all the same.
    rolling: compress after every piece of a prompt that is read in chunks, so that no more than the budget and a piece is ever held; else
    nothing leaves before its end.
    """

    budget: Budget = 0.2
    window: int = 400
    recent: int = 10
    drop: float = 0.5
    bits: int | None = None
    ramp: float = 0.0
    rolling: bool = False

    columns = True
    planes = {"low": Plane(0.0)}
    dense_prefill = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("window", self.window, 1)
        check_count("recent", self.recent, 1)
        check_range("drop", self.drop, 0, 1)
        if self.drop == 1:
            raise InputError("drop = 1 would empty the cache: expected a share of the budget below 1")
        check_range("ramp", self.ramp, 0, 0.99)
        if isinstance(self.budget, float) and self.budget * (1 + self.ramp) > 1:
            raise InputError(
                f"budget = {self.budget} with ramp = {self.ramp} is more than everything in the last layer: give less of either"
            )
        check_rolling(self.rolling)
        if self.bits not in (None, 4, 8):
            raise InputError(
                f"bits = {self.bits!r}: expected 4 or 8, or None for keys and values as the model makes them"
            )

    @property
    def format(self) -> str | None:
        return None if self.bits is None else f"int{self.bits}"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"col_low:{self.window}"})

    def begin(self, pass_) -> tuple[int, ...] | None:
        """Whether some row will hold more than its budget after this step: the host knows, without asking the device.

        Such a step is like no other, so that no graph is recorded of it.
        """
        budgets = ramped(self.budget, self.ramp, len(pass_.store.rows))
        full = pass_.decode and any(self._full(pass_, *x) for x in zip(pass_.store.rows, budgets, strict=True))
        pass_.state["scissorhands.full"] = full
        return tuple(pass_.counts) if full else None

    @staticmethod
    def _full(pass_, rows, budget: Budget) -> bool:
        """Rows of one layer, before the step's own keys. A length no row exceeds will do, where it is below every budget."""
        sizes = [tokens_of(budget, n + pass_.length) for n in pass_.counts]
        if rows.T + pass_.length <= min(sizes):
            return False
        held = (pair for c in rows.classes for pair in zip(c.numbers(), c.lengths(), strict=True))
        return any(n + pass_.length > sizes[row // rows.heads] for row, n in held)

    def keep(self, step) -> Keep | None:
        if not step.decode and self.window <= step.L:  # older queries are out of the window
            step.store.set("low", torch.zeros_like(step.store.plane("low")))
        step.tally("low", "col_low")  # whole numbers: ties stay ties
        if not (step.prompt_done or self.rolling) or (step.decode and not step.state["scissorhands.full"]):
            return None
        layers = step.model.layers
        size = step.budget(ramped(self.budget, self.ramp, len(layers))[layers.index(step.layer)])
        held = step.store.uniform
        if held is not None and isinstance(size, int):
            return self._compress(step, min(size, held - max(1, int(self.drop * size)))) if held > size else None
        return self._compress_rows(step, size)

    def _score(self, step):
        """High is worth keeping: seldom low, among equals the newer; the newest are safe."""
        token = step.token
        score = token.double() / 2.0**31 - step.store.plane("low")  # float32 would lose the order among equal counts
        return score.masked_fill(token > step.q_token[:, -1, None, None] - self.recent, float("inf"))

    def _compress(self, step, left: int) -> Keep:
        return step.keep_best(self._score(step), max(left, self.recent))

    def _compress_rows(self, step, size) -> Keep | None:
        """Rows of a batch that fill up at different times."""
        held = step.store.len
        over = held > size
        amount = torch.as_tensor(size, device=step.device)
        left = torch.minimum(amount, held - (self.drop * amount).long().clamp(min=1)).clamp(min=self.recent)
        rank = self._score(step).masked_fill(~step.store.valid, -float("inf")).argsort(-1, descending=True).argsort(-1)
        return Keep(mask=(rank < torch.where(over, left, held)[..., None]) & step.store.valid)


@lru_cache(maxsize=64, typed=True)
def ramped(budget: Budget, ramp: float, layers: int) -> tuple[Budget, ...]:
    """The budget of each layer, rising evenly from `budget` times 1 - ramp to 1 + ramp; numbers of tokens add up to `budget` a layer."""
    if ramp == 0 or layers == 1:
        return (budget,) * layers
    each = [budget * (1 + ramp * (2 * i / (layers - 1) - 1)) for i in range(layers)]
    return tuple(each) if isinstance(budget, float) else tuple(exact(each, budget * layers, 1, [2 * budget] * layers))

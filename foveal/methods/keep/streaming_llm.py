"""StreamingLLM: the first tokens, which absorb attention nobody wants, and a rolling window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...edits import Keep, Leave, Plane
from ...errors import InputError
from ...method import Budget, Method, check_budget, check_count, method, tokens_of
from ...selection import Band, Selection
from ...verify import Claim, Falls, StaysNear


@method(
    "streaming-llm",
    paper="Efficient Streaming Language Models with Attention Sinks (2023) [113]",
    claim=Claim(
        "Perplexity stays flat at constant memory when 4 sink tokens are kept beside the window; a window alone fails.",
        number="Llama-2-13B, PG-19, 65,000 tokens: perplexity 5.40 with 4 + 1,020 keys, 5,158 with a window of 1,024",
        experiments=(
            StaysNear("streaming-llm(budget=256)", "perplexity", within=0.3),
            Falls("streaming-llm(budget=256, sink=0)", "perplexity", by=1.0),
        ),
        setting="texts of 1,024 tokens, inside the positions the model was trained on",
    ),
)
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keep `sink` first tokens and the newest, `budget` keys in all (paper: 4 + 1,020).

    What a query sees is the same in prefill and decode. Beside the sinks a query always sees itself and the key before it, whatever
    the budget.

    positions: "original" leaves keys where they were; "cache" numbers them inside the cache, so that text may outgrow the model's
    positions (read long prompts in chunks then).

    zero_sink: the softmax of every row gets one more key, with logit 0 and a value of zero (the paper's SoftMax-off-by-One, for models
    trained with it). A model trained with a placeholder token before every text needs no other setting than sink=1 and that token.
    """

    budget: Budget = 1024
    sink: int = 4
    positions: str = "original"
    zero_sink: bool = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("sink", self.sink)
        if self.positions not in ("original", "cache"):
            raise InputError(f"positions = {self.positions!r}: expected 'original' or 'cache'")
        if not isinstance(self.zero_sink, bool):
            raise InputError(f"zero_sink = {self.zero_sink!r}: expected True or False")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"lse"}) if self.zero_sink else frozenset()

    @property
    def renumber(self) -> bool:
        return self.positions == "cache"

    @property
    def unbounded(self) -> bool:
        return self.renumber  # distances stay inside the cache

    @property
    def planes(self) -> dict[str, Plane]:
        return {"shift": Plane(0, torch.int32)} if self.renumber else {}

    def setup(self, model) -> None:
        if self.renumber:
            _ = model.rope  # raises now where keys cannot be moved

    def begin(self, pass_) -> None:
        """Refuse what would reach beyond the model's positions even inside the cache."""
        limit = pass_.session.info.max_positions
        if not self.renumber or limit is None:
            return
        size = max(min(n, max(tokens_of(self.budget, n + 1), self.sink + 2) - 1) for n in pass_.counts)
        if size + pass_.length > limit:
            raise InputError(
                f"{size} keys in the cache and {pass_.length} new tokens are more than the model's {limit} positions: "
                "give a smaller budget or read the prompt in smaller chunks"
            )

    def _size(self, step, ahead: int):
        """Keys a query may see, itself included: at least the sinks, the newest key and its own."""
        return step.budget(self.budget, ahead, least=self.sink + 2)

    def select(self, step) -> Selection:
        if step.decode or (size := self._size(step, ahead=0)) >= step.store.T:
            return super().select(step)
        return Band(self.sink, size - self.sink)

    def mix(self, step, out: Tensor) -> Tensor:
        if not self.zero_sink:
            return out
        return out * step.stats["lse"].sigmoid()[..., None].to(out.dtype)  # sum / (1 + sum) of the exponentials

    def keep(self, step) -> Keep | Leave | None:
        held = self._size(step, ahead=1) - 1  # with the next token itself, that is what its query may see
        moved = self.sink if self.renumber else 0
        if step.decode and not moved:
            return Leave(held, after=self.sink)
        if step.decode:
            return step.evict_one(step.oldest(after=self.sink), held, renumber=moved)
        if held >= step.store.T:
            return None
        if not moved:
            return step.keep_ends(self.sink, held - self.sink)
        token, last = step.token, step.q_token[:, -1, None, None]
        return Keep(mask=(token < self.sink) | (last - token < held - self.sink), renumber=moved)

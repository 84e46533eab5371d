"""Several questions after one compression, as turns of one conversation (after SCBench, Li et al., 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass

from foveal.tasks.needle import Needle
from foveal.tasks.retrieval import Fact
from foveal.tasks.task import Turn


@dataclass(frozen=True, kw_only=True)
class MultiTurn(Needle):
    """`needle` asked in turns: each question follows the earlier ones and their right answers, in shuffled order.

    The document is read and compressed once, before any question; what a method dropped for the first question it
    needs for the last. As in SCBench the earlier turns hold the right answers, so that turns can be scored one by one.
    per_context: turns in a conversation (default 4). `Sample.turn` counts from 0.
    """

    name = "multi-turn"

    per_context: int = 4

    def facts(self, seed: int, group: int, depths: Sequence[float]) -> list[Fact]:
        """One fact for each depth, in the order in which they are asked for."""
        facts = super().facts(seed, group, depths)
        self._rng(seed, f"{group}/order").shuffle(facts)
        return facts

    def talk(self, facts: list[Fact], i: int) -> list[Turn]:
        """Everything asked and answered before, then the question for fact `i`."""
        return [(fact.question, fact.lead, fact.answer) for fact in facts[: i + 1]]

"""Arithmetic that takes a long answer: does a method keep what was written while it goes on writing?"""

import re
from dataclasses import dataclass

from foveal.tasks.drafted import Draft, Drafted, Prompt
from foveal.tasks.task import Sample, encode

_TASK = (
    "You start with a number and change it step by step. Write each step on a line of its own: "
    "the number before, the change, and the number after."
)


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Drafted):
    """A list of additions and subtractions below 100, to be worked out line by line (as InfiniteBench's Math.Calc).

    The steps are as many as fit `max_new_tokens` (512) and the length; a worked example of 5 comes first. Score: the
    share of the numbers, in order, that are right up to the first that is not.
    """

    name = "arithmetic"

    max_new_tokens: int = 512

    def draft(self, tokenizer, length, seed, index):
        rng = self._rng(seed, index)
        example, start = self._steps(rng, 5), rng.randint(10, 89)
        shown = f"{_TASK}\n\n{_listed(*example)}\nSteps:\n{_worked(*example)}\n\n"
        _, changes = self._steps(rng, self.max_new_tokens, start)

        def build(pieces: int) -> Prompt:
            golds = tuple(re.findall(r"= (\d+)", _worked(start, changes[:pieces])))
            return Prompt(f"{shown}{_listed(start, changes[:pieces])}\n", "Write all steps.", "Steps:", golds)

        low, high = 1, self.max_new_tokens  # an answer has a token for each step at the least
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(encode(tokenizer, "\n" + _worked(start, changes[:middle]))) <= self.max_new_tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        return Draft(1, build, low)

    def _steps(self, rng, count: int, start: int | None = None) -> tuple[int, list[int]]:
        start = rng.randint(10, 89) if start is None else start
        changes, value = [], start
        for _ in range(count):
            change = rng.choice([c for c in range(-9, 10) if c and 0 <= value + c <= 99])
            changes.append(change)
            value += change
        return start, changes

    def score(self, sample: Sample, answer: str) -> float:
        """The share of results, the numbers after "=", that are right up to the first that is not."""
        right = 0
        for said, gold in zip(re.findall(r"=\s*(-?\d+)", answer), sample.target, strict=False):
            if said != gold:
                break
            right += 1
        return right / len(sample.target)


def _listed(start: int, changes: list[int]) -> str:
    return f"Start: {start}\nChanges: {', '.join(f'{change:+d}' for change in changes)}"


def _worked(start: int, changes: list[int]) -> str:
    lines, value = [], start
    for change in changes:
        lines.append(f"{value} {'+' if change > 0 else '-'} {abs(change)} = {value + change}")
        value += change
    return "\n".join(lines)

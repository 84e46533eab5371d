"""What a paper claims and how it is tested here, written in the file of its method."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from .experiments import Experiment


@dataclass(frozen=True)
class Claim:
    """A paper's claim and the experiments that test it; it holds when all of them hold.

    words: the claim in one sentence.  number: the number the paper reports, with model and data.
    experiments: written before they are run, never changed to pass.  setting: how the experiments differ from the paper's, beside
    the model.  untestable: why there is no experiment. Raises InputError without words, and unless there are either experiments
    or a reason for having none.
    """

    words: str
    number: str = ""
    experiments: tuple[Experiment, ...] = ()
    setting: str = ""
    untestable: str = ""

    def __post_init__(self) -> None:
        for name in ("words", "number", "setting", "untestable"):
            if not isinstance(value := getattr(self, name), str):
                raise InputError(f"expected the {name} of a claim as text, got {value!r}")
        if not self.words.strip():
            raise InputError("a claim without words: say in one sentence what the paper claims")
        good = isinstance(self.experiments, tuple) and all(isinstance(e, Experiment) for e in self.experiments)
        if not good:
            raise InputError(f"expected the experiments of a claim as a tuple, got {self.experiments!r:.80}")
        if bool(self.experiments) == bool(self.untestable.strip()):
            raise InputError(
                f"the claim '{self.words:.60}' needs either experiments or the reason why it has none: give one of the two"
            )

    def __str__(self) -> str:
        return self.words

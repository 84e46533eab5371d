"""The needle-in-a-haystack grid (Kamradt, 2023) and several needles for one question."""

from dataclasses import dataclass

from foveal.errors import InputError
from foveal.tasks.drafted import Draft, Drafted, Prompt
from foveal.tasks.task import place
from foveal.tasks.words import CITIES, FOODS, sentences

_PLACES = (
    "on the wharf",
    "by the old church",
    "in the garden",
    "under a tree",
    "at the window of an inn",
    "on the beach",
)
_WEATHER = ("sunny", "windy", "rainy", "cold", "misty", "snowy", "warm", "stormy")


@dataclass(frozen=True, kw_only=True)
class NeedleGrid(Drafted):
    """What is best to do in a city stands once in a novel; the depths go round evenly from 0 to 1.

    Run it over several lengths for the grid. depths: how many depths (10 as usual; the original grid has 35).
    As in the original, the needle goes to the end of the sentence before its depth. Score: the share of the three
    parts of the answer (food, place, weather) that are found; cities and parts are drawn anew for each sample.
    """

    name = "niah"

    depths: int = 10
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.depths, bool) or not isinstance(self.depths, int) or self.depths < 2:
            raise InputError(f"Expected depths to be a whole number from 2 on, got {self.depths!r}; 10 is usual.")

    def draft(self, tokenizer, length, seed, index):
        rng, depth = self._rng(seed, index), (index % self.depths) / (self.depths - 1)
        city, food = rng.choice(CITIES), rng.choice(FOODS)
        golds = (food, rng.choice(_PLACES), f"{rng.choice(_WEATHER)} day")
        lead = f"The best thing to do in {city} is"
        needle = f"{lead} to eat {golds[0]} and sit {golds[1]} on a {golds[2]}. "
        text = _from(place(seed, index))

        def build(pieces: int) -> Prompt:
            document = _hide(text(pieces), [needle], [depth])
            return Prompt(f"{document}\n\n", f"What is the best thing to do in {city}?", lead, golds, depth)

        return Draft(1, build)


@dataclass(frozen=True, kw_only=True)
class MultiNeedle(Drafted):
    """Ingredients hidden at depths spread evenly through a novel, all asked for in one question.

    needles: how many (default 3). Score: the share of the ingredients in the answer.
    """

    name = "multi-needle"

    needles: int = 3
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.needles, bool) or not isinstance(self.needles, int) or not 2 <= self.needles <= 10:
            raise InputError(f"Expected needles to be a whole number from 2 to 10, got {self.needles!r}; choose one.")

    def draft(self, tokenizer, length, seed, index):
        rng = self._rng(seed, index)
        foods = tuple(rng.sample(FOODS, self.needles))
        hidden = [f"A secret ingredient of the perfect pie is {food}. " for food in foods]
        depths = [(i + rng.random()) / self.needles for i in range(self.needles)]
        text = _from(place(seed, index))

        def build(pieces: int) -> Prompt:
            question = f"What are the {self.needles} secret ingredients of the perfect pie?"
            return Prompt(
                f"{_hide(text(pieces), hidden, depths)}\n\n",
                question,
                f"The {self.needles} secret ingredients of the perfect pie are",
                foods,
            )

        return Draft(self.needles, build)


def _from(where: float):
    """The first so many sentences of the book from `where` on."""
    text = sentences()
    start = int(where * len(text))
    text = text[start:] + text[:start]
    return lambda pieces: [text[i % len(text)] for i in range(pieces)]


def _hide(pieces: list[str], needles: list[str], depths: list[float]) -> str:
    """The text with each needle at the last end of a sentence that is not beyond its depth, by characters."""
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    text = list(pieces)
    for needle, depth in reversed(list(zip(needles, depths, strict=True))):
        at = max(i for i, end in enumerate(ends) if end <= depth * ends[-1] + 1e-6)
        text.insert(at, needle if at < len(pieces) or pieces[-1][-1:].isspace() else f" {needle}")
    return "".join(text).rstrip()

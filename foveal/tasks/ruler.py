"""RULER-style tasks, regenerated: what all thirteen share, and the eight needles (Hsieh et al., 2024).

The prompts, counts, generated tokens and scores are RULER's; the texts are drawn anew. Two things differ and make the
results "RULER-style": the essays are replaced by *Moby-Dick*, and the words come from it too. As in RULER, the length
includes the generated tokens, the haystack is the largest that fits by the model's tokenizer, and the words that begin
the answer follow the chat template's generation prompt.
"""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from foveal.tasks.drafted import Draft, Drafted, Prompt
from foveal.tasks.task import place
from foveal.tasks.words import magic_key, sentences

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# Depths in percent, of which each document draws as many as it has needles.
NEEDLE_DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@dataclass(frozen=True, kw_only=True)
class Ruler(Drafted):
    """Base of the RULER-style tasks. RULER scores 500 samples of each; below 100 a table should not be published."""

    label = "RULER-style, regenerated"


@dataclass(frozen=True, kw_only=True)
class MagicNeedles(Ruler):
    """Magic values for keys, between noise lines, between sentences of a novel, or among more of their kind.

    haystack: "noise" (one line repeated), "prose" (RULER's "essay") or "needles". key_kind, value_kind: "words",
    "numbers" (7 digits) or "uuids". keys, values, queries: how many keys, values of each, and keys asked for.
    """

    haystack = "prose"
    key_kind = "words"
    value_kind = "numbers"
    keys = 1
    values = 1
    queries = 1

    max_new_tokens: int = 128

    def draft(self, tokenizer, length, seed, index):
        rng = self._rng(seed, index)
        keys = list({_draw(self.key_kind, rng): None for _ in range(3 * self.keys)})[: self.keys]
        facts = [(key, _draw(self.value_kind, rng)) for key in keys for _ in range(self.values)]
        asked = rng.sample(keys, self.queries)
        golds = tuple(value for key in asked for k, value in facts if k == key)
        rng.shuffle(facts)
        places = rng.getrandbits(64)
        hay = _prose(place(seed, index)) if self.haystack == "prose" else _lines(self, keys, rng)

        def build(pieces: int) -> Prompt:
            needles = [NEEDLE.format(kind=self.value_kind, key=key, value=value) for key, value in facts]
            document, depths = hay(pieces, needles, random.Random(places))
            found = [depth for (key, _), depth in zip(facts, depths, strict=True) if key in asked]
            return self._prompt(document, asked, golds, found[0] if len(found) == 1 else None)

        return Draft(100 if self.haystack == "prose" else len(facts), build)

    def _prompt(self, text: str, asked: list[str], golds: tuple[str, ...], depth: float | None) -> Prompt:
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        one = len(golds) == 1
        kind = self.value_kind.removesuffix("s") if one else self.value_kind
        start = (
            f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden within the following text."
        )
        quiz = f"Make sure to memorize it. I will quiz you about the {kind} afterwards."
        verb = "is" if one else "are all"
        question = f"What {verb} the special magic {kind} for {query} mentioned in the provided text?"
        lead = f"The special magic {kind} for {query} mentioned in the provided text {'is' if one else 'are'}"
        return Prompt(f"{start} {quiz}\n{text}\n", question, lead, golds, depth)


# A haystack: of so many pieces, with these needles in it; also the needles' depths from 0 to 1, in their order.
Hay = Callable[[int, list[str], random.Random], tuple[str, list[float]]]


def _prose(where: float) -> Hay:
    """So many words of the book from a sentence at `where` on; needles go between sentences at drawn depths."""
    text = sentences()
    start = int(where * len(text))
    text = text[start:] + text[:start]

    def hay(words: int, needles: list[str], rng: random.Random) -> tuple[str, list[float]]:
        kept, left, i = [], words, 0
        while left > 0:
            sentence = text[i % len(text)].split()[:left]
            if sentence:
                kept.append(" ".join(sentence))
            left, i = left - len(sentence), i + 1
        depths = sorted(rng.sample(NEEDLE_DEPTHS, len(needles)))
        places = [len(kept) * depth // 100 for depth in depths]
        for at, needle in reversed(list(zip(places, needles, strict=True))):
            kept.insert(at, needle)
        return " ".join(kept), [depth / 100 for depth in depths]

    return hay


def _lines(task: MagicNeedles, keys: list[str], rng: random.Random) -> Hay:
    """So many lines of noise, or needles with other keys; those asked for go between them at drawn lines."""
    lines: list[str] = []

    def hay(count: int, needles: list[str], places: random.Random) -> tuple[str, list[float]]:
        while len(lines) < count:  # lines are drawn once, so that more of them begin with the same
            if task.haystack == "noise":
                lines.append(NOISE)
            elif (key := _draw(task.key_kind, rng)) not in keys:
                lines.append(NEEDLE.format(kind=task.value_kind, key=key, value=_draw(task.value_kind, rng)))
        chosen = sorted(places.sample(range(count), len(needles)))
        text = lines[:count]
        for index, needle in reversed(list(zip(chosen, needles, strict=True))):
            text.insert(index, needle)
        return "\n".join(text), [index / count for index in chosen]

    return hay


def _draw(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    return magic_key(rng) if kind == "words" else str(uuid.UUID(int=rng.getrandbits(128), version=4))


class NiahSingle1(MagicNeedles):
    """One number in repeated noise."""

    name, haystack = "niah_single_1", "noise"


class NiahSingle2(MagicNeedles):
    """One number in prose."""

    name = "niah_single_2"


class NiahSingle3(MagicNeedles):
    """One UUID in prose."""

    name, value_kind = "niah_single_3", "uuids"


class NiahMultikey1(MagicNeedles):
    """Four keys in prose, one asked for."""

    name, keys = "niah_multikey_1", 4


class NiahMultikey2(MagicNeedles):
    """One number among nothing but others of its kind."""

    name, haystack = "niah_multikey_2", "needles"


class NiahMultikey3(MagicNeedles):
    """One UUID of a UUID among nothing but others of its kind."""

    name, haystack, key_kind, value_kind = "niah_multikey_3", "needles", "uuids", "uuids"


class NiahMultivalue(MagicNeedles):
    """Four numbers of one key, all asked for."""

    name, values = "niah_multivalue", 4


class NiahMultiquery(MagicNeedles):
    """Four keys with a number each, all asked for."""

    name, keys, queries = "niah_multiquery", 4, 4


NEEDLE_TASKS = (
    *(NiahSingle1, NiahSingle2, NiahSingle3, NiahMultikey1, NiahMultikey2, NiahMultikey3),
    *(NiahMultivalue, NiahMultiquery),
)

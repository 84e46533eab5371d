"""Retrieval without meaning: a UUID in a JSON object, ten digits in noise (after InfiniteBench, Zhang et al., 2024)."""

import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from foveal.tasks.passkey import Passkey
from foveal.tasks.retrieval import Fact, Retrieval
from foveal.tasks.scoring import whole_word


@dataclass(frozen=True, kw_only=True)
class RetrieveKV(Retrieval):
    """A JSON object of random UUIDs; the value of one key is asked for. Nothing can be summarised, all keys look alike.

    per_context: keys asked for in one object, each in a prompt of its own. Score: 1 if the value is in the answer.
    """

    name = "retrieve-kv"
    opening = "Extract the value corresponding to the specified key in the JSON object below.\n\n"

    per_context: int = 1
    max_new_tokens: int = 50

    def facts(self, seed: int, group: int, depths: Sequence[float]) -> list[Fact]:
        """One pair for each depth."""
        rng = self._rng(seed, group)
        facts = []
        for depth in depths:
            key, value = _uuid(rng), _uuid(rng)
            lead = "The value associated with the specified key is:"
            facts.append(Fact(f'"{key}": "{value}"', f'Key: "{key}"', lead, value, depth))
        return facts

    def filler(self, seed: int, group: int):
        """More pairs, drawn once."""
        rng = random.Random(f"{self.name}/{seed}/{group}/filler")
        pairs: list[str] = []

        def first(pieces: int) -> list[str]:
            while len(pairs) < pieces:
                pairs.append(f'"{_uuid(rng)}": "{_uuid(rng)}"')
            return pairs[:pieces]

        return first

    def _document(self, pieces: list[str], facts: list[Fact]) -> str:
        return f"{self.opening}{{{', '.join(self._spread(pieces, facts))}}}\n\n"

    def score(self, sample, answer: str) -> float:
        """1.0 if the value is one of the answer's words, quotes aside, else 0.0."""
        return whole_word(answer, (sample.target,))


@dataclass(frozen=True, kw_only=True)
class RetrieveNumber(Passkey):
    """As `passkey`, with ten digits of which neighbours repeat ("7779933338"): it takes precision to copy them."""

    name = "retrieve-number"
    what = "sequence of digits"

    max_new_tokens: int = 16

    def _keys(self, rng: random.Random, count: int) -> list[str]:
        keys: dict[str, None] = {}
        while len(keys) < count:
            runs, digit = "", ""
            while len(runs) < 10:
                digit = rng.choice("0123456789".replace(digit, "") if digit else "123456789")
                runs += digit * rng.randint(1, 4)
            if re.search(r"(.)\1", runs[:10]):
                keys[runs[:10]] = None
        return list(keys)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))

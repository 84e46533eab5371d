"""Heads in order of one score, whatever it was, with random heads as controls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..heads import HeadRoles, roles_for
from ..method import check_count
from ..methods.keep.profiles import profile_for
from .result import Look

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class HeadRanking:
    """The measured heads of a model by the score `name` of `roles`; ascending: the smallest score comes first.

    Ties go to the earlier layer and head.
    """

    roles: HeadRoles
    name: str
    ascending: bool = False

    def __post_init__(self) -> None:
        self.roles[self.name]  # raises for an unknown name

    @staticmethod
    def of(look: Look, measure: str, ascending: bool = False) -> HeadRanking:
        """By a measure [layer, head] of a look; raises InputError for any other."""
        return HeadRanking(look.roles(measure), measure, ascending)

    @property
    def score(self) -> Tensor:
        """[layers, heads]; 0 in layers that were not measured."""
        return self.roles[self.name]

    def __len__(self) -> int:
        return len(self.roles.measured) * self.score.shape[1]

    def top(self, n: int) -> Pairs:
        """The first `n` heads as pairs (layer, head), best first: what the methods `ablate` and `scale-heads` take."""
        return tuple(self._order()[: self._count(n)])

    def above(self, threshold: float) -> Pairs:
        """All heads with a score of at least `threshold` (at most, where ascending), best first."""
        good = self.score <= threshold if self.ascending else self.score >= threshold
        return tuple(p for p in self._order() if good[p])

    def control(self, n: int, seed: int, *, per_layer: bool = False) -> Pairs:
        """As many random heads outside the top `n`; per_layer: as many in each layer as the top has there.

        Raises InputError where too few are left.
        """
        mask = torch.zeros(self.score.shape, dtype=torch.bool)
        for pair in self.top(n):
            mask[pair] = True
        drawn = self.roles.random_like(mask, seed, per_layer=per_layer, outside=mask)
        return tuple((int(i), int(h)) for i, h in drawn.nonzero())

    def overlap(self, other: HeadRanking, n: int) -> tuple[float, float]:
        """(share of the top `n` that both rankings have in common, what chance would give: n over the number of heads)."""
        self._same(other)
        both = set(self.top(n)) & set(other.top(n))
        return len(both) / n, n / len(self)

    def correlation(self, other: HeadRanking) -> float:
        """Spearman's rank correlation over the measured heads, ties at their mean rank; NaN where all scores of one are equal."""
        self._same(other)
        rows = list(self.roles.measured)
        a, b = (_ranks(x.score[rows].flatten()) * (-1 if x.ascending else 1) for x in (self, other))
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    def _order(self) -> list[tuple[int, int]]:
        rows, heads = list(self.roles.measured), self.score.shape[1]
        order = self.score[rows].flatten().argsort(descending=not self.ascending, stable=True)
        return [(rows[i // heads], i % heads) for i in order.tolist()]

    def _count(self, n: int) -> int:
        check_count("n", n, 1)
        if n > len(self):
            raise InputError(f"expected at most {len(self)} heads, those that were measured, got n = {n}")
        return n

    def _same(self, other: HeadRanking) -> None:
        a, b = self.roles, other.roles
        if a.identity["weights"] != b.identity["weights"] or a.measured != b.measured:
            raise InputError(
                f"'{self.name}' and '{other.name}' rank heads of two different models: measure both on one"
            )


def rankings(model, look: Look | None = None) -> dict[str, HeadRanking]:
    """Every ranking there is for a model: its head roles (retrieval [51], induction, ...), its semantic retrieval heads ([142]), where
    these were measured, and the measures of heads of a look at it.

    Raises InputError where the look is of another model.
    """
    found: dict[str, HeadRanking] = {}
    for source, names in ((roles_for, None), (lambda m: profile_for(m, "compress_kv"), ("semantic",))):
        try:
            roles = source(model)
        except InputError:
            continue
        found |= {name: HeadRanking(roles, name) for name in names or roles.scores}
    if look is not None:
        roles = look.roles().for_model(model)
        found |= {name: HeadRanking(roles, name) for name in roles.scores}
    return found


def _ranks(x: Tensor) -> Tensor:
    """1, 2, ... by value, ties at their mean rank."""
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]

"""How much of a model's prediction is memory: its likelihoods beside those of an n-gram of any length (2025 [23])."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError
from ..model_info import ModelInfo
from .attribution.ranks import spearman
from .reading import tokens_of


class InfinityGram:
    """Counts of every stretch of a corpus: the next token's likelihood after the longest suffix of a context that occurs in it.

    corpus: token ids, at least two. Held as a suffix array, 8 bytes a token, made in n log^2 n.
    """

    def __init__(self, corpus: Sequence[int]):
        self.tokens = np.asarray(corpus, dtype=np.int64)
        if self.tokens.ndim != 1 or len(self.tokens) < 2:
            raise InputError(f"expected a corpus of at least two token ids, got shape {list(self.tokens.shape)}")
        self.order = _suffix_array(self.tokens)

    def range(self, stretch: Sequence[int]) -> tuple[int, int]:
        """Where in the suffix array the suffixes stand that begin with a stretch; as many as it occurs."""
        low, high = 0, len(self.order)
        for depth, token in enumerate(stretch):
            low, high = self._narrow(low, high, depth, token)
        return low, high

    def _narrow(self, low: int, high: int, depth: int, token: int) -> tuple[int, int]:
        """Of suffixes that agree up to `depth`, those with `token` next."""
        edges = []
        for bound in (token, token + 1):
            a, b = low, high
            while a < b:
                middle = (a + b) // 2
                if self._at(middle, depth) < bound:
                    a = middle + 1
                else:
                    b = middle
            edges.append(a)
        return edges[0], edges[1]

    def _at(self, row: int, depth: int) -> int:
        """The token at `depth` of a suffix; before all others where it has ended."""
        place = self.order[row] + depth
        return int(self.tokens[place]) if place < len(self.tokens) else -1

    def log_likelihood(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ln P(ids[t] | longest known suffix of ids[:t]), that suffix's length), [length - 1] each, t from 1; -inf where never seen.

        A suffix counts when something follows it somewhere in the corpus; the empty one always does.
        """
        ids, logp, lengths = [int(i) for i in ids], [], []
        n = 0
        for t in range(1, len(ids)):
            n = min(n + 1, t)  # a suffix of t tokens ends with one of t - 1
            while True:
                low, high = self.range(ids[t - n : t])
                ended = int(high > low and self._at(low, n) == -1)  # the one that ends the corpus sorts first
                if high - low > ended or n == 0:
                    break
                n -= 1
            a, b = self._narrow(low, high, n, ids[t])
            logp.append(math.log((b - a) / (high - low - ended)) if b > a else -math.inf)
            lengths.append(n)
        return torch.tensor(logp), torch.tensor(lengths)


def _suffix_array(tokens: np.ndarray) -> np.ndarray:
    """Places of the suffixes in order, by doubling: rank pairs of ranks until all differ."""
    n = len(tokens)
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    step = 1
    while True:
        second = np.full(n, -1, dtype=np.int64)
        second[: max(0, n - step)] = rank[step:]
        order = np.lexsort((second, rank))
        changed = (np.diff(rank[order]) != 0) | (np.diff(second[order]) != 0)
        new = np.empty(n, dtype=np.int64)
        new[order] = np.concatenate([[0], np.cumsum(changed)])
        rank, step = new, 2 * step
        if rank.max() == n - 1:
            return order


@torch.no_grad()
def memorisation(
    model, tokenizer, corpus: InfinityGram, texts: Sequence[str | Sequence[int]], start: Sequence[int] | None = None
) -> float:
    """Spearman's correlation, over the tokens of all texts, of the model's log-likelihoods with those of the corpus.

    start: of each text, the first token that counts, as where its answer begins; default 1. Tokens the corpus never saw there tie at the
    bottom. Raises InputError for fewer than two tokens in all, and for what `foveal.lens.look` refuses.
    """
    info = ModelInfo.of(model)
    starts = [1] * len(texts) if start is None else [int(s) for s in start]
    if len(starts) != len(texts) or any(s < 1 for s in starts):
        raise InputError(f"expected a first token from 1 on for each of {len(texts)} texts, got {starts}")
    own, known = [], []
    for text, first in zip(texts, starts, strict=True):
        ids = tokens_of(model, tokenizer, text, info)
        x = torch.tensor([ids], device=model.device)
        logits = model(x, use_cache=False).logits[0, :-1].float()
        own.append(-F.cross_entropy(logits, x[0, 1:], reduction="none").cpu()[first - 1 :])
        known.append(corpus.log_likelihood(ids)[0][first - 1 :])
    a, b = torch.cat(own), torch.cat(known)
    if len(a) < 2:
        raise InputError("expected at least two tokens to compare: give longer texts, or start earlier")
    return spearman(a, b)

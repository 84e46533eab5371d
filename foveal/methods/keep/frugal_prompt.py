"""FrugalPrompt: the words of a prompt that contributed most to what a model made of each sentence, in order."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ...errors import InputError
from ...method import Budget, Method, check_budget, check_count, method
from ...verify import Beats, Claim, StaysNear
from .attribution import by_the_model, decompx, globenc
from .words import Words, split, tokenizer_of


class Scorer(NamedTuple):
    """What `setup` loads: the model's own tokenizer and, where one is named, an encoder with its tokenizer."""

    tokenizer: Any
    encoder: Any
    encoder_tokenizer: Any


@method(
    "frugal-prompt",
    paper="FrugalPrompt: Reducing Contextual Overhead in Large Language Models via Token Attribution (2025) [141]",
    claim=Claim(
        "A fifth of a prompt's words can be left out by attribution at little cost, and at less than leaving out others.",
        number="GPT-3.5, Llama 3 8B and 70B: little loss at 80 % on sentiment, questions and news summaries, a sharp one on word problems",
        experiments=(
            StaysNear("frugal-prompt(budget=0.8)", "needle", within=0.2, query_aware=True),
            Beats(
                "frugal-prompt(budget=0.8)",
                "frugal-prompt(budget=0.84, which='bottom')",
                "needle",
                by=0.1,
                query_aware=True,
            ),
        ),
        setting="needles in prose, the question being part of the prompt that is shortened; words scored by the model itself. A word's "
        "score is a sum over its tokens, so the best words are the longer ones: the control is given 84 % of the words for equal bytes",
    ),
)
@dataclass(frozen=True)
class FrugalPrompt(Method):
    """Before the model runs, the best `budget` of the prompt's words are chosen (a share or a number), and only they are read, in order.

    A token's score is its attribution in its sentence, scaled to 0 .. 1 there, times the sentence's LexRank weight in the prompt; a word's
    is the sum over its tokens. Special tokens and the roles of a chat always stay, as does the newest token.

    encoder: a classifier laid out as BERT, ELECTRA, RoBERTa or XLM-R are, by its Hugging Face id or folder (the paper's: ELECTRA and XLM-R
    large, for natural-language inference); None lets the attached model attribute its own states, sentence by sentence.
    attribution: "globenc" or, with an encoder, "decompx" for the class number `label`.  which: "top"; "bottom" and "random" are the
    paper's controls. Models without a tokenizer take every token for a word. Reads a prompt whole, never in chunks.
    """

    budget: Budget = 0.8
    encoder: str | None = None
    attribution: str = "globenc"
    label: int = 0
    which: str = "top"

    needs = frozenset({"whole_prompt"})

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("label", self.label)
        if self.attribution not in ("globenc", "decompx"):
            raise InputError(f"attribution = {self.attribution!r}: expected 'globenc' or 'decompx'")
        if self.attribution == "decompx" and self.encoder is None:
            raise InputError("attribution = 'decompx' is that of a classifier: name one as `encoder`")
        if self.which not in ("top", "bottom", "random"):
            raise InputError(f"which = {self.which!r}: expected 'top', 'bottom' or 'random'")

    def where(self, model) -> tuple[int, ...]:
        return ()

    def setup(self, model) -> Scorer:
        own = tokenizer_of(model.model)
        if self.encoder is None:
            return Scorer(own, None, None)
        if own is None:
            raise InputError(
                "an encoder reads words, but this model has no tokenizer that tells them: leave `encoder` out"
            )
        try:
            encoder = AutoModelForSequenceClassification.from_pretrained(self.encoder).eval().to(model.model.device)
            tokenizer = AutoTokenizer.from_pretrained(self.encoder, use_fast=True)
        except (OSError, ValueError) as error:
            raise InputError(f"encoder = {self.encoder!r} cannot be loaded as a classifier: {error}") from error
        if not 0 <= self.label < encoder.config.num_labels:
            raise InputError(f"label = {self.label}: {self.encoder} has {encoder.config.num_labels} classes")
        return Scorer(own, encoder, tokenizer)

    def read(self, prompt) -> Tensor | None:
        ids = prompt.ids.tolist()
        words = split(ids, prompt.plan.tokenizer)
        free = [w for w, fixed in enumerate(words.fixed) if not fixed]
        count = self.budget if isinstance(self.budget, int) else max(1, math.floor(self.budget * len(free) + 0.5))
        if count >= len(free):
            return None
        chosen = set(self._ranked(prompt, ids, words, free)[:count])
        chosen = [w for w, fixed in enumerate(words.fixed) if fixed or w in chosen]
        read = torch.zeros(len(ids), dtype=torch.bool)
        read[words.tokens(chosen)] = True
        return read

    def _ranked(self, prompt, ids: list[int], words: Words, free: list[int]) -> list[int]:
        """The words that may be left out, the most worthy of staying first; of equals the earlier."""
        if self.which == "random":
            order = torch.randperm(len(free), generator=torch.Generator().manual_seed(len(ids)))
            return [free[i] for i in order.tolist()]
        scores = self.scores(prompt, ids, words)
        sign = -1 if self.which == "top" else 1
        return sorted(free, key=lambda w: sign * scores[w])

    def scores(self, prompt, ids: list[int], words: Words) -> list[float]:
        """What each word is worth."""
        loose = [[w for w in sentence if not words.fixed[w]] for sentence in words.sentences]
        loose = [s for s in loose if s]
        found = (
            self._by_encoder(prompt.plan, words, loose) if self.encoder else self._by_model(prompt, ids, words, loose)
        )
        worth = [0.0] * len(words.spans)
        weights = lex_rank([[words.texts[w] for w in s] for s in loose])
        for sentence, weight, (owners, x) in zip(loose, weights, found, strict=True):
            for owner, value in zip(owners, scaled(x).tolist(), strict=True):
                worth[sentence[owner]] += weight * value
        return worth

    def _by_model(self, prompt, ids, words: Words, loose: Sequence[Sequence[int]]) -> list[tuple[list[int], Tensor]]:
        """For each sentence, which of its words each token belongs to, and the token's attribution."""
        begin = getattr(prompt.plan.tokenizer, "bos_token_id", None)
        first = [] if begin is None else [begin]
        texts = [first + [ids[t] for t in words.tokens(s)] for s in loose]
        owners = [[i for i, w in enumerate(s) for _ in range(*words.spans[w])] for s in loose]
        return [(o, x[len(first) :]) for o, x in zip(owners, by_the_model(prompt, texts), strict=True)]

    def _by_encoder(self, plan: Scorer, words: Words, loose: Sequence[Sequence[int]]) -> list[tuple[list[int], Tensor]]:
        found = []
        for sentence in loose:
            texts = [words.texts[w].strip() for w in sentence]
            made = plan.encoder_tokenizer(texts, is_split_into_words=True, truncation=True)
            ids = torch.tensor(made["input_ids"], device=plan.encoder.device)
            x = (
                decompx(plan.encoder, ids, self.label)[0]
                if self.attribution == "decompx"
                else globenc(plan.encoder, ids)
            )
            inside = [(i, w) for i, w in enumerate(made.word_ids()) if w is not None]
            found.append(([w for _, w in inside], x[[i for i, _ in inside]]))
        return found


def scaled(x: Tensor) -> Tensor:
    """Brought to 0 .. 1; all equal, and so all alone, is 1."""
    low, high = x.min(), x.max()
    return torch.ones_like(x) if high <= low else (x - low) / (high - low)


def lex_rank(sentences: Sequence[Sequence[str]], damping: float = 0.85) -> list[float]:
    """The weight of each sentence, given as its words: PageRank over the idf-weighted cosine of every pair (Erkan and Radev 2004, without
    threshold); weights sum to one."""
    bags = [Counter(w for text in s for w in re.findall(r"\w+", text.lower())) for s in sentences]
    n = len(bags)
    idf = {w: math.log(n / c) + 1e-6 for w, c in Counter(w for bag in bags for w in bag).items()}
    places = {w: i for i, w in enumerate(idf)}
    vectors = torch.zeros(n, max(1, len(places)), dtype=torch.float64)
    found = [(i, places[w], count * idf[w]) for i, bag in enumerate(bags) for w, count in bag.items()]
    row, column, value = torch.tensor(found, dtype=torch.float64).reshape(-1, 3).T
    vectors[row.long(), column.long()] = value
    unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    alike = unit @ unit.T + torch.eye(n, dtype=torch.float64) * (vectors.norm(dim=1) == 0)[:, None]
    step = alike / alike.sum(1, keepdim=True)
    weight = torch.full((n,), 1 / n, dtype=torch.float64)
    for _ in range(100):
        weight = (1 - damping) / n + damping * (step.T @ weight)
    return weight.tolist()

"""InfiniRetri: a text is read piece by piece, and of each piece only the sentences go on that the question looks at."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Method, check_count, method
from ...verify import BytesAtMost, Claim, StaysNear
from .scoring import attention
from .words import packed, split, tokenizer_of

_ARM = "infini-retri(chunk=512, top=48, question=48)"


@dataclass(frozen=True, eq=False)
class Looked(Method):
    """Writes down where the last `rows` tokens look in one layer: found = [rows, tokens], summed over heads."""

    layer: int
    rows: int
    found: list[Tensor] = field(default_factory=list)

    def where(self, model) -> tuple[int, ...]:
        return (self.layer,)

    def after(self, step) -> None:
        self.found.append(attention(step, start=step.L - self.rows)[0].float().sum(0))


@method(
    "infini-retri",
    paper="Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing (2025) [121]",
    claim=Claim(
        "Sentences the question looks at in the last layer, carried from piece to piece as text, hold what is asked for at any length.",
        number="Qwen2.5 0.5B: every needle in a million tokens, with 32,000 positions; answers from 5 to 10 % of the text",
        experiments=(
            StaysNear(_ARM, "needle", within=0.1, length=2048, query_aware=True),
            BytesAtMost(_ARM, 0.4, "needle", length=2048),
        ),
        setting="texts the model could read whole; pieces of 512 tokens and 48 tokens that choose sentences, for 1,024 and 300",
    ),
)
@dataclass(frozen=True)
class InfiniRetri(Method):
    """Before the model reads a prompt, its text is cut into pieces of whole sentences, `chunk` tokens at most. Each piece is read after the
    sentences remembered so far and before the question; of both, those sentences are remembered that hold one of the `top` tokens the
    question looks at most in the last layer. What is read in the end, and answered from, is what was remembered and the question; so a
    text may be longer than the model's positions, while a piece with all it is read with may not.

    A token's score is the attention of all heads, summed over `phrase` neighbours and over the question's tokens, each with the square of
    the attention that the question paid itself in the first piece. weighted=False: the plain sum, without neighbours or weights.
    question: the last tokens of the prompt (default: about the paper's 512 characters); they, the beginning of a chat up to its text, and
    special tokens are always read. Models without a tokenizer have sentences of chunk / 8 tokens. No chunks of a prompt beside these.
    """

    chunk: int = 1024
    top: int = 300
    phrase: int = 8
    question: int = 128
    weighted: bool = True

    needs = frozenset({"whole_prompt"})
    neutral = {"top": 1_000_000}
    example = {"top": 6, "chunk": 16, "question": 8, "phrase": 3}

    def __post_init__(self) -> None:
        for name in ("chunk", "top", "phrase", "question"):
            check_count(name, getattr(self, name), 1)
        if not isinstance(self.weighted, bool):
            raise InputError(f"weighted = {self.weighted!r}: expected True or False")

    def where(self, model) -> tuple[int, ...]:
        return ()

    def setup(self, model):
        return tokenizer_of(model.model)

    def read(self, prompt) -> Tensor | None:
        ids = prompt.ids.tolist()
        opening, sentences, end = self._parts(ids, prompt.plan)
        if not sentences:
            return None
        remembered: list[Sequence[int]] = []
        weight = None
        for piece in packed([len(s) for s in sentences], self.chunk):
            candidates = [*remembered, *(sentences[i] for i in piece)]
            places = [t for s in candidates for t in s]
            looked = self._look(prompt, [*opening, *places, *range(end, len(ids))], len(ids) - end)
            if weight is None:
                weight = looked[:, -looked.shape[0] :].sum(-1)
            scores = self._score(looked[:, len(opening) : len(opening) + len(places)], weight)
            best = {places[i] for i in scores.topk(min(self.top, len(places))).indices.tolist()}
            remembered = [s for s in candidates if not best.isdisjoint(s)]
        dropped = {t for s in sentences for t in s} - {t for s in remembered for t in s}
        return torch.tensor([t not in dropped for t in range(len(ids))])

    def _parts(self, ids: list[int], tokenizer) -> tuple[list[int], list[list[int]], int]:
        """Places of the opening's tokens, those of each sentence of the text, and where the question begins."""
        words = split(ids, tokenizer, max(1, self.chunk // 8))
        latest = len(ids) - self.question
        asked = [a for a, b in words.spans if b > latest]
        end = asked[0] if latest > 0 and asked else 0
        limit = min(end, self.chunk)
        first = max(
            (b for (a, b), fixed in zip(words.spans, words.fixed, strict=True) if fixed and a < limit), default=0
        )
        sentences = []
        for sentence in words.sentences:
            inside = [w for w in sentence if first <= words.spans[w][0] < end and not words.fixed[w]]
            sizes = [words.spans[w][1] - words.spans[w][0] for w in inside]
            runs = packed(sizes, self.chunk) if sum(sizes) > self.chunk else [range(len(inside))]
            sentences += [words.tokens([inside[i] for i in run]) for run in runs if len(run)]
        return list(range(first)), sentences, end

    @staticmethod
    def _look(prompt, places: list[int], rows: int) -> Tensor:
        """Where the last `rows` of these tokens look when they are a text, [rows, tokens]."""
        probe = Looked(prompt.model.layers[-1], rows)
        prompt.run(prompt.ids[places][None], probe)
        return probe.found[0]

    def _score(self, looked: Tensor, weight: Tensor) -> Tensor:
        """What each token of the text is worth: looked [rows, tokens], weight [rows]."""
        if not self.weighted:
            return looked.sum(0)
        left, right = self.phrase // 2, (self.phrase - 1) // 2  # of an even number, one more before the token
        padded = torch.nn.functional.pad(looked, (left, right))
        phrases = padded.unfold(1, self.phrase, 1).sum(-1)
        return (weight.square()[:, None] * phrases).sum(0)

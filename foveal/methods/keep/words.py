"""Shared by methods that shorten prompts: which tokens make up a word, and which words a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import AutoTokenizer, PreTrainedModel

from ...default_model import DEFAULT_MODEL, default_folder
from ...errors import InputError

ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
_CLOSING = "\"')]\u201d\u2019\u00bb"


# loading takes a second: the name of what was loaded beside a model, and its tokenizer
_TOKENIZERS: WeakKeyDictionary[PreTrainedModel, tuple[str, Any]] = WeakKeyDictionary()


class Words(NamedTuple):
    """Words of a text: the tokens of each, spans [start, stop); its letters; whether it may be left out; and sentences as runs of words."""

    spans: list[tuple[int, int]]
    texts: list[str]
    fixed: list[bool]
    sentences: list[range]

    def tokens(self, words: Sequence[int]) -> list[int]:
        """Places in the text of the tokens of these words."""
        return [t for w in words for t in range(*self.spans[w])]


def tokenizer_of(model):
    """The tokenizer kept beside a model, loaded once; None for a model that was never loaded from anywhere. Only to be read.

    Raises InputError where the model came from somewhere and its tokenizer is not there.
    """
    name = model.name_or_path
    if not name:
        return None
    if _TOKENIZERS.get(model, ("",))[0] == name:
        return _TOKENIZERS[model][1]
    try:
        folder = default_folder() if name == DEFAULT_MODEL else name
        _TOKENIZERS[model] = name, AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return _TOKENIZERS[model][1]
    except (OSError, ValueError) as error:
        raise InputError(
            f"expected the tokenizer of {name} beside it, which tells words from tokens: load the model with foveal.load"
        ) from error


def split(ids: Sequence[int], tokenizer, longest: int = 64) -> Words:
    """The words and sentences of a text.

    A word begins after white space. Special tokens, and what touches them (the speaker's role in a chat), are words that may not be left
    out. A sentence ends with a full stop, a question or exclamation mark, a line, or its `longest`th word. Without a tokenizer every token
    is a word and only the length ends a sentence.
    """
    if tokenizer is None:
        spans = [(i, i + 1) for i in range(len(ids))]
        return Words(spans, [str(t) for t in ids], [False] * len(ids), _sentences([""] * len(ids), longest))
    special = set(tokenizer.all_special_ids)
    pieces = _pieces(ids, tokenizer)
    starts = [i for i in range(len(ids)) if i == 0 or _begins(i, ids, pieces, special)]
    spans = list(zip(starts, [*starts[1:], len(ids)], strict=True))
    texts = ["".join(pieces[a:b]) for a, b in spans]
    fixed = [ids[a] in special or (a > 0 and ids[a - 1] in special) for a, _ in spans]
    ends = ["\n" if f else t for t, f in zip(texts, fixed, strict=True)]
    return Words(spans, texts, fixed, _sentences(ends, longest))


def _pieces(ids: Sequence[int], tokenizer) -> list[str]:
    """The letters of each token; SentencePiece hides the blank before a word when it decodes a token alone."""
    named = {i: tokenizer.convert_ids_to_tokens(int(i)) or "" for i in set(ids)}
    text = {
        i: " " * name.startswith("▁") + tokenizer.decode([int(i)]).removeprefix(" " * name.startswith("▁"))
        for i, name in named.items()
    }
    return [text[i] for i in ids]


def _begins(i: int, ids: Sequence[int], pieces: Sequence[str], special: set[int]) -> bool:
    if ids[i] in special or ids[i - 1] in special:
        return True
    if not pieces[i].strip():  # white space goes with the word before it
        return False
    return pieces[i][:1].isspace() or pieces[i - 1][-1:].isspace()


def _sentences(texts: Sequence[str], longest: int) -> list[range]:
    found, start = [], 0
    for i, text in enumerate(texts):
        last = "\n" in text or text.strip().rstrip(_CLOSING).endswith(ENDS) or i + 1 - start == longest
        if last or i + 1 == len(texts):
            found.append(range(start, i + 1))
            start = i + 1
    return found


def packed(sizes: Sequence[int], most: int) -> list[range]:
    """Neighbouring pieces together, up to `most` tokens: runs of indices. A last run of less than half shares with the one before."""
    runs, start, size = [], 0, 0
    for i, n in enumerate(sizes):
        if i > start and size + n > most:
            runs.append(range(start, i))
            start, size = i, 0
        size += n
    runs.append(range(start, len(sizes)))
    if len(runs) > 1 and size < most / 2:
        first, stop = runs[-2].start, runs[-1].stop
        middle = _halves(sizes[first:stop]) + first
        runs[-2:] = [range(first, middle), range(middle, stop)]
    return runs


def _halves(sizes: Sequence[int]) -> int:
    half: Callable[[int], int] = lambda i: abs(2 * sum(sizes[:i]) - sum(sizes))
    return min(range(1, len(sizes)), key=half)

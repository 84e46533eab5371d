"""Which tokens of a text an answer rests on, by one method out of several; and what such numbers do not say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ...errors import InputError, suggest
from .question import Question
from .scores import DRAWN, METHODS, SIGNED, attention_times_gradient, row_normed
from .tap import Tap, check_length, tapped

Progress = Callable[[str, float], None]

_READ = (
    "These are places the model read from, not reasons: what was read may have changed nothing. Compare with 'perturbation' and with "
    "`deletion_curves` before calling it an explanation."
)
_FIRST_ORDER = "First order only: it says how the answer moves for a small change, and saturated attention has small gradients everywhere."
CAUTION = {
    "attention": _READ,
    "rollout": _READ + " Rollout also takes every head to pass everything on and leaves MLPs out.",
    "norms": _READ,
    "attention-gradient": _FIRST_ORDER,
    "gradient-input": _FIRST_ORDER,
    "integrated-gradients": "It depends on the baseline: another text that stands for 'nothing' gives other numbers.",
    "gradient-shap": "It depends on the baseline, and on the points drawn.",
    "shapley": "It depends on the baseline, on the orders drawn, and on texts with most tokens gone, which the model never saw.",
    "lime": "A linear model of a model: tokens that count only together are given what fits best, and few samples give another answer.",
    "perturbation": "Tokens are replaced one at a time: of two that say the same neither seems to matter.",
}
"""For each method, what its numbers do not say."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each token of a text counts for one answer.

    method: its name.  tokens, texts: the text.  target: token id (or class).  score: its log-probability, nats.  values [length]: float32
    on the CPU, signed where the method tells help from harm (`signed`), else not negative.
    """

    method: str
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    target: int
    score: float
    values: Tensor

    @property
    def signed(self) -> bool:
        return self.method in SIGNED

    @property
    def magnitude(self) -> Tensor:
        """Values without their sign: what rankings and agreements are made of."""
        return self.values.abs()

    @property
    def caution(self) -> str:
        """What these numbers do not say."""
        return CAUTION[self.method]

    def top(self, count: int = 5) -> list[tuple[int, str, float]]:
        """(position, text, value) of the tokens with the largest magnitude."""
        order = self.magnitude.argsort(descending=True, stable=True)[:count].tolist()
        return [(i, self.texts[i], float(self.values[i])) for i in order]

    def __rich__(self) -> Table:
        table = Table(title=f"{self.method}: what the answer rests on", caption=self.caution)
        for name in ("position", "token", "value"):
            table.add_column(name, justify="left" if name == "token" else "right")
        for i, text, value in self.top(10):
            table.add_row(str(i), repr(text), f"{value:.4f}")
        return table


def explain(
    model,
    tokenizer,
    text: str | Sequence[int],
    method: str = "attention-gradient",
    *,
    target: int | None = None,
    baseline: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Attribution:
    """How much each token of a text counts for what the model says next (or for its class).

    method: one of `foveal.lens.attribution.METHODS`.  target: the token id or class explained; default the model's own first choice.
    baseline: the token id that stands for "no token here"; default padding, else the zero vector.  options: of the method, "over" for
    attention and norms, "steps" for integrated gradients, "samples" and "seed" for what is drawn at random.
    Raises InputError for an unknown method, target or option, a text over 512 tokens, and, where gradients are needed, for quantised
    weights and gradients that are switched off; UnsupportedModel for encoder-decoders and models whose attention cannot be tapped.
    """
    return ask(Question.of(model, tokenizer, text, target, baseline), method, progress, **options)


def ask(question: Question, method: str, progress: Progress | None = None, **options: Any) -> Attribution:
    """One method on a question that is already posed."""
    if method not in METHODS:
        raise InputError(f"no attribution method '{method}': {suggest(method, METHODS)}")
    run = METHODS[method]
    known = {"over": ("attention", "norms"), "steps": ("integrated-gradients",), "samples": DRAWN, "seed": DRAWN}
    for option in options:
        if method not in known.get(option, ()):
            raise InputError(f"'{method}' has no option '{option}': leave it out")
    if method == "perturbation":
        options["progress"] = progress
    values = run(question, **options).detach().float().cpu()
    return Attribution(method, tuple(question.ids), question.words, question.target, question.whole, values)


# ---------------------------------------------------------------------- saliency of a continuation


@dataclass(frozen=True, eq=False)
class Saliency:
    """Attention times gradient at the position that predicts one token (LVLMs-Saliency 2026 [98]).

    rows [layers, length]: mean over heads of |A * gradient|, each layer's row with L2 norm one (zero where no gradient flows).
    layers: which they are.
    """

    rows: Tensor
    layers: tuple[int, ...]

    def share(self, start: int, stop: int) -> Tensor:
        """How much of each layer's row falls on the tokens start .. stop - 1, [layers]; rows sum to one here."""
        return self.rows[:, start:stop].sum(-1) / self.rows.sum(-1).clamp(min=1e-9)

    def on(self, start: int, stop: int) -> float:
        """The paper's s: mean over layers and over the tokens start .. stop - 1 of the rows; 1 where there are none."""
        return 1.0 if stop <= start else float(self.rows[:, start:stop].mean())


def saliency(
    model, tokenizer, text: str | Sequence[int], *, target: int | None = None, layers: Sequence[int] | None = None
) -> Saliency:
    """Saliency of every token before the one that is predicted; layers: default all. Errors as `explain`."""
    question = Question.of(model, tokenizer, text, target)
    found = attention_times_gradient(question, None if layers is None else frozenset(layers))
    return Saliency(row_normed(found).cpu(), tuple(found))


def saliency_trace(
    model,
    tokenizer,
    prompt: str | Sequence[int],
    output: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """For each token of an output how strongly it rests on the output before it, [tokens]: low values announce a hallucination [98].

    One forward and backward pass for each token; the first has no output before it and gets 1. Rows are read at the position that
    predicts a token (the position after it has no gradient at all). Errors as `explain`, and InputError for an empty output.
    """
    start = Question.of(model, tokenizer, prompt)
    ids, out = start.ids, [int(i) for i in output]
    if not out:
        raise InputError("the output is empty: give at least one token")
    found = []
    for n, token in enumerate(out):
        seen = saliency(model, None, ids + out[:n], target=token, layers=layers) if n else None
        found.append(1.0 if seen is None else seen.on(len(ids), len(ids) + n))
        if progress is not None:
            progress("saliency of the output", (n + 1) / len(out))
    return torch.tensor(found)


# ---------------------------------------------------------------------- set rows by hand


class _Rows(Tap):
    def __init__(self, rows: dict[tuple[int, int], Tensor], position: int):
        self.rows, self.position = rows, position

    def weights(self, layer: int, a: Tensor, v: Tensor, module) -> Tensor:
        mine = {h: x for (i, h), x in self.rows.items() if i == layer}
        if not mine:
            return a
        a = a.clone()
        for head, row in mine.items():
            if row.shape != a.shape[-1:]:
                raise InputError(
                    f"expected a row of {a.shape[-1]} weights for head {layer}.{head}, got {list(row.shape)}"
                )
            a[:, head, self.position] = row.to(a)
        return a


def override_rows(model, rows: dict[tuple[int, int], Tensor], position: int = -1):
    """A `with` block in which single heads attend as told: rows (layer, head) -> weights [length] of the query at `position` [71].

    Raises InputError for heads the model does not have, rows over 512 tokens, and weights that are negative or do not sum to one (to at
    most one, where the model has a learned sink).
    """
    config = model.config.get_text_config()
    for (layer, head), row in rows.items():
        check_length(len(row), "a row set by hand")
        if not (0 <= layer < config.num_hidden_layers and 0 <= head < config.num_attention_heads):
            raise InputError(
                f"there is no head {head} in layer {layer}: expected a layer below {config.num_hidden_layers} and a head below "
                f"{config.num_attention_heads}"
            )
        if bool((row < 0).any()) or float(row.sum()) > 1 + 1e-3 or float(row.sum()) <= 0:
            raise InputError(
                f"expected weights of head {layer}.{head} that sum to one, got a sum of {float(row.sum()):.3f}"
            )
    return tapped(model, _Rows(rows, position))

"""Train DuoAttention's head gates: which KV heads a model cannot do without when it recalls passkeys from a long text.

    python -m foveal.methods.keep.duo_train [--model ID] [--device cuda] [--out FILE]

Two readings of each text (118, section 2.2): the dense model, and a student whose heads are a mixture, gate x what the dense model's head
gave + (1 - gate) x attention to sinks and a recent window. Gates are pulled down, and up by the distance of the last hidden states where
answers stand. Weights are frozen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...attach import attach
from ...command import Command, run
from ...data import book
from ...errors import InputError
from ...heads import HeadRoles
from ...hub import model_identity
from ...method import Method, check_count, check_range
from ...model_info import ModelInfo
from ...selection import Band, Selection
from ...tasks.task import encode
from .profiles import profile_path

# fmt: off
WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima", "mike", "november",
    "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu",
)
_NAMES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
# fmt: on
LENGTH_STEPS = 50
DEPTH = 0.05  # passkeys stand from this share of the text to one minus it


@dataclass(frozen=True)
class Recipe:
    """How gates are trained. Defaults suit a model of 135M parameters and 8,192 positions, the paper's numbers are in brackets.

    lengths: shortest and longest text in tokens [1,000 to 32,000], in 50 steps.  passkeys, words: how many passkeys a text hides, of
    how many words each [10, 32].  sink, recent: what a streaming head sees [128, 256].  steps, rate: optimiser steps of one text, AdamW's
    learning rate, warmed up and cooled down over a fifth of the steps each [2,000, 0.02].  sparsity: weight of the mean gate [0.05].
    """

    steps: int = 1000
    lengths: tuple[int, int] = (512, 2048)
    passkeys: int = 5
    words: int = 16
    sink: int = 16
    recent: int = 64
    rate: float = 0.02
    sparsity: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "words"):
            check_count(name, getattr(self, name), 1)
        check_count("recent", self.recent, 2)
        check_count("sink", self.sink)
        check_range("passkeys", self.passkeys, 1, len(_NAMES))
        check_range("sparsity", self.sparsity, 0)
        low, high = self.lengths
        if not 0 < low <= high:
            raise InputError(f"lengths = {self.lengths}: expected the shortest and the longest text in tokens")


# ---------------------------------------------------------------------- texts


class Texts:
    """Passages of a novel with passkeys at random depths; they end with all questions and their answers."""

    def __init__(self, tokenizer, recipe: Recipe, haystack: str | None = None):
        self.recipe, self.rng = recipe, random.Random(recipe.seed)
        self.encode = lambda text: encode(tokenizer, text)
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.pool = self.encode(book() if haystack is None else haystack)
        low, high = recipe.lengths
        self.sizes = sorted({round(low + i * (high - low) / (LENGTH_STEPS - 1)) for i in range(LENGTH_STEPS)})

    def draw(self) -> tuple[list[int], int]:
        """Token ids of a text, and where its questions begin: what is recalled."""
        size, rng = self.rng.choice(self.sizes), self.rng
        keys = [" ".join(rng.choices(WORDS, k=self.recipe.words)) for _ in range(self.recipe.passkeys)]
        told = [
            self.encode(f"\n\nRemember this. The {n} passkey is {k}.\n\n") for n, k in zip(_NAMES, keys, strict=False)
        ]
        asked = [
            self.encode(f"\n\nWhat is the {n} passkey? The {n} passkey is {k}.")
            for n, k in zip(_NAMES, keys, strict=False)
        ]
        questions = [t for a in asked for t in a]
        rest = size - len(self.start) - len(questions) - sum(map(len, told))
        if rest < len(told):
            raise InputError(
                f"a text of {size} tokens has no room for {len(keys)} passkeys of {self.recipe.words} words: ask for fewer, or longer texts"
            )
        begin = rng.randrange(max(1, len(self.pool) - rest))
        hay, at, text = self.pool[begin : begin + rest], 0, list(self.start)
        cuts = sorted(round(rng.uniform(DEPTH, 1 - DEPTH) * len(hay)) for _ in told)
        for cut, sentence in zip(cuts, told, strict=True):
            text += hay[at:cut] + sentence
            at = cut
        text += hay[at:]
        return text + questions, len(text)


# ---------------------------------------------------------------------- teacher and student


@dataclass(frozen=True, eq=False)
class Teacher(Method):
    """The dense model; writes down what its heads gave: record[layer] = [batch, heads, length, head_dim]."""

    record: dict[int, Tensor] = field(default_factory=dict)

    def mix(self, step, out: Tensor) -> Tensor:
        self.record[step.layer] = out.detach()
        return out


@dataclass(frozen=True, eq=False)
class Student(Method):
    """Each KV head a mixture of what the teacher's gave and of attention to `sink` first tokens and a window; gates [layers, kv_heads]."""

    gates: Tensor
    teacher: Teacher
    sink: int
    recent: int

    def select(self, step) -> Selection:
        return Band(self.sink, self.recent)

    def mix(self, step, out: Tensor) -> Tensor:
        gate = step.per_head(self.gates[step.layer].view(1, -1, 1, 1)).to(out.dtype)
        return gate * self.teacher.record[step.layer] + (1 - gate) * out


def distance(model, ids: Tensor, first: int, gates: Tensor, sink: int, recent: int) -> Tensor:
    """Mean squared distance of the student's last hidden states (after the final norm) from the teacher's, from token `first` on."""
    teacher, decoder = Teacher(), model.get_decoder()
    with torch.no_grad(), attach(model, teacher, graphs=False):
        wanted = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, first:].float()
    with attach(model, Student(gates, teacher, sink, recent), graphs=False):
        got = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, first:].float()
    return (got - wanted).square().mean()


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate at a step: from a tenth up over the first fifth, and down to a tenth over the last."""
    ramp = max(1, round(0.2 * steps))
    return 0.1 + 0.9 * min(1.0, step / ramp, (steps - 1 - step) / ramp)


def train(
    model, tokenizer, recipe: Recipe | None = None, progress: Callable[[str], None] = lambda line: None, *, texts=None
) -> HeadRoles:
    """Gates of all KV heads as the score "gate", [layers, heads] (equal for the query heads of one KV head).

    texts: what draws (token ids, where recall begins); default: `Texts` of the recipe. Raises InputError for texts longer than the
    model's positions, before any step.
    """
    recipe = recipe or Recipe()
    info = ModelInfo.of(model)
    if info.max_positions is not None and recipe.lengths[1] > info.max_positions:
        raise InputError(f"texts of {recipe.lengths[1]} tokens, but the model has {info.max_positions} positions")
    texts = texts or Texts(tokenizer, recipe)
    layers = list(info.layers)
    gates = torch.ones(info.n_layers, info.kv_heads, device=model.device, requires_grad=True)
    optimiser = torch.optim.AdamW([gates], lr=recipe.rate, weight_decay=0.0)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    lines: list[float] = []
    try:
        for p, _ in frozen:
            p.requires_grad_(False)
        for step in range(recipe.steps):
            with torch.no_grad():
                gates.clamp_(0, 1)
            optimiser.param_groups[0]["lr"] = recipe.rate * rate_at(step, recipe.steps)
            ids, first = texts.draw()
            ids = torch.tensor([ids], device=model.device)
            apart = distance(model, ids, first, gates, recipe.sink, recipe.recent)
            loss = apart + recipe.sparsity * gates[layers].abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            lines.append(apart.detach())
            if step % 50 == 49 or step == recipe.steps - 1:
                mean = torch.stack(lines[-50:]).mean().item()
                progress(
                    f"step {step + 1}: distance {mean:.4f}, mean gate {gates[layers].clamp(0, 1).mean().item():.3f}"
                )
    finally:
        for p, needed in frozen:
            p.requires_grad_(needed)
    return _roles(model, info, recipe, gates.detach().clamp(0, 1).cpu(), torch.stack(lines[-50:]).mean().item())


def _roles(model, info: ModelInfo, recipe: Recipe, gates: Tensor, last: float) -> HeadRoles:
    gates = gates.float().round(decimals=5)
    gates[[i for i in range(info.n_layers) if i not in info.layers]] = 0.0
    scores = {"gate": gates.repeat_interleave(info.heads // info.kv_heads, 1)}
    source = {
        "scores": {"gate": "share of the whole cache in a mixture with a window, trained to recall passkeys"},
        "recipe": {**vars(recipe), "lengths": list(recipe.lengths)},
        "distance of the last 50 steps": round(last, 5),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    return HeadRoles(model_identity(model), scores, source, info.layers)


def main(arguments: Sequence[str] | None = None) -> None:
    command, usual = Command(__spec__.name, __doc__), Recipe()
    command.add_settings(usual, "steps", "passkeys", "words", "sink", "recent", "seed")
    command.add_argument("--lengths", type=int, nargs=2, default=usual.lengths, metavar=("SHORTEST", "LONGEST"))
    place, chosen = command.read(arguments)
    recipe = Recipe(**{**vars(chosen), "lengths": tuple(chosen.lengths)})
    model, tokenizer = place.load()
    gates = train(model, tokenizer, recipe, lambda line: print(line, flush=True))
    print("wrote", gates.save(place.out or profile_path(model, "duo")))


if __name__ == "__main__":
    run(main)

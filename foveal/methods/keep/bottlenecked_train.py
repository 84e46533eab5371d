"""Train the cache processor of a Bottlenecked Transformer: the next line should be easier to predict from a rewritten cache.

    python -m foveal.methods.keep.bottlenecked_train [--model ID] [--device cuda] [--out FILE]

The backbone is frozen. A worked sum is read line by line; after each line the cache is rewritten, the next line's loss is propagated to the
processor alone, and the cache goes on without gradient (2, section 3: truncated to one step). Then the loss on other sums is measured
with the cache as it is, rewritten, and changed at random by as much. The paper fine-tunes the backbone on its data first; here it stays
as it is, so part of a gain may be the format of the data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...attach import attach
from ...command import Command, run
from ...errors import InputError, UnsupportedModel
from ...method import check_count, check_range
from ...model_info import ModelInfo
from ...stats import paired_bootstrap
from ...tasks.task import encode
from .bottlenecked import Bottlenecked, Processor, Setup, close, processor_path, put, tokens_at

WAYS = ("frozen", "trained", "random")
"""The cache as it is; rewritten; changed in a random direction, each token by as much as the processor would."""


@dataclass(frozen=True)
class Recipe:
    """How a processor is trained. samples: worked sums, each used once.  held_out: those it is measured on.  rate: AdamW's learning
    rate, down to a tenth in a straight line.  recent, earlier: what is rewritten (see Bottlenecked).  width, inner, heads: of its blocks
    (paper: 512, 2,240, 16).  The paper trains on 128,000 solutions.
    """

    samples: int = 500
    held_out: int = 50
    rate: float = 1e-3
    recent: int = 64
    earlier: int = 32
    width: int = 32
    inner: int = 140
    heads: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "held_out", "recent", "width", "inner", "heads"):
            check_count(name, getattr(self, name), 1)
        check_count("earlier", self.earlier)
        check_range("rate", self.rate, 1e-8, 1)


def sums(tokenizer, rng: random.Random) -> list[list[int]]:
    """A worked sum of three to six numbers, as the token ids of its lines."""
    numbers = [rng.randrange(10, 100) for _ in range(rng.randrange(3, 7))]
    lines, total = [f"Add {', '.join(map(str, numbers))} one after the other.\n"], numbers[0]
    for n in numbers[1:]:
        lines.append(f"{total} + {n} = {total + n}\n")
        total += n
    return [encode(tokenizer, line) for line in [*lines, f"The sum is {total}.\n"]]


# ---------------------------------------------------------------------- a cache rewritten with and without a gradient


@dataclass(frozen=True, eq=False)
class Learner(Bottlenecked):
    """Every piece that is read is a step. `last` is what the cache held before it was rewritten: keys and values of each layer, the slots
    that were chosen, and what stood there."""

    network: Processor | None = None
    way: str = "trained"
    last: dict[str, Any] = field(default_factory=dict)

    def setup(self, model) -> Setup:
        return Setup(self.network, frozenset(range(model.model.config.get_text_config().vocab_size)))

    @torch.no_grad()
    def rewrite(self, layers: Sequence, b: int, processor: Processor) -> None:
        slots = [self.chosen(rows, b) for rows in layers]
        x = torch.stack([tokens_at(rows, b, s) for rows, s in zip(layers, slots, strict=True)])
        held = [(rows.keys().clone(), rows.values().clone()) for rows in layers]
        self.last.update(held=held, slots=slots, x=x)
        y = x if self.way == "frozen" else x + self.change(x)
        for rows, s, new in zip(layers, slots, y, strict=True):
            put(rows, b, s, new)
            close(rows, b)

    def change(self, x: Tensor) -> Tensor:
        """What is added to the chosen tokens [layers, tokens, size]."""
        change = self.network(x.float())
        if self.way == "random":
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.shape[1])).to(change)
            change = noise * change.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return change.to(x.dtype)

    def cache(self) -> DynamicCache:
        """What the model goes on with, as a function of the processor."""
        y = self.last["x"] if self.way == "frozen" else self.last["x"] + self.change(self.last["x"])
        cache = DynamicCache()
        for layer, ((key, value), slots, new) in enumerate(zip(self.last["held"], self.last["slots"], y, strict=True)):
            heads = key.shape[1]
            new = new.unflatten(1, (2 * heads, -1)).transpose(0, 1)[None]
            cache.update(
                key.index_copy(2, slots[0], new[:, :heads]), value.index_copy(2, slots[0], new[:, heads:]), layer
            )
        return cache


def next_losses(model, learner: Learner, lines: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """The mean loss of each line but the first, its first token aside, from a cache that was rewritten after each line before it.

    Gradients reach the processor through the newest rewriting only.
    """
    store = None
    for line, following in pairwise(lines):
        with torch.no_grad(), attach(model, learner, graphs=False):
            store = model(
                torch.tensor([line], device=model.device), past_key_values=store, logits_to_keep=1
            ).past_key_values
        ids = torch.tensor([following], device=model.device)
        logits = model(ids, past_key_values=learner.cache(), use_cache=True).logits[0, :-1]
        yield torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])


# ---------------------------------------------------------------------- training


def train(
    model,
    tokenizer,
    recipe: Recipe | None = None,
    progress: Callable[[str], None] = lambda line: None,
    *,
    draw: Callable[[random.Random], list[list[int]]] | None = None,
) -> tuple[Processor, dict[str, Any]]:
    """A trained processor, and what it is worth on held-out sums: nats per token of the next line by each of WAYS, and paired gains.

    draw: what makes a sample, lines of token ids each of at least two (default: `sums`). Raises UnsupportedModel where some layers keep
    no cache of their own or key and value sizes differ.
    """
    recipe = recipe or Recipe()
    info = ModelInfo.of(model)
    if len(info.layers) < info.n_layers:
        raise UnsupportedModel(
            "only models whose layers all attend to everything can be trained on: some of these do not"
        )
    draw = draw or (lambda rng: sums(tokenizer, rng))
    shape = {"width": recipe.width, "inner": recipe.inner, "heads": recipe.heads}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = Processor(info.n_layers, 2 * info.kv_heads * info.head_dim, **shape).to(model.device)
    learner = Learner(recipe.recent, recipe.earlier, newline=(), network=network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.rate)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    rng, recent = random.Random(f"train/{recipe.seed}"), []
    try:
        for p, _ in frozen:
            p.requires_grad_(False)
        for n in range(recipe.samples):
            optimiser.param_groups[0]["lr"] = recipe.rate * (1 - 0.9 * n / recipe.samples)
            for loss in next_losses(model, learner, _checked(draw(rng))):
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                recent.append(loss.detach())
            if n % 50 == 49:
                progress(
                    f"{n + 1} samples: {torch.stack(recent[-200:]).mean().item():.4f} nats per token of the next line"
                )
        found = evaluate(model, learner, draw, recipe)
    finally:
        for p, needed in frozen:
            p.requires_grad_(needed)
    return network, found


def _checked(lines: list[list[int]]) -> list[list[int]]:
    if len(lines) < 2 or min(map(len, lines)) < 2:
        raise InputError("expected samples of at least two lines, of at least two tokens each")
    return lines


@torch.no_grad()
def evaluate(model, learner: Learner, draw: Callable, recipe: Recipe) -> dict[str, Any]:
    """Mean nats per token of the next line by each of WAYS on held-out samples, and how much the processor gains over the two others."""
    means: dict[str, list[float]] = {}
    for way in WAYS:
        rng = random.Random(f"held out/{recipe.seed}")
        one = Learner(learner.recent, learner.earlier, newline=(), network=learner.network, way=way)
        each = [torch.stack(list(next_losses(model, one, _checked(draw(rng))))) for _ in range(recipe.held_out)]
        means[way] = [x.mean().item() for x in each]
    worse = lambda way: paired_bootstrap(means[way], means["trained"], seed=recipe.seed)
    found = {way: sum(x) / len(x) for way, x in means.items()}
    return found | {f"gain over {way}": list(worse(way)[:3]) for way in ("frozen", "random")}


def main(arguments: Sequence[str] | None = None) -> None:
    command = Command(__spec__.name, __doc__)
    names = ("samples", "held_out", "recent", "earlier", "width", "inner", "heads", "seed", "rate")
    command.add_settings(Recipe(), *names)
    place, chosen = command.read(arguments)
    recipe = Recipe(**vars(chosen))
    model, tokenizer = place.load()
    network, found = train(model, tokenizer, recipe, lambda line: print(line, flush=True))
    print({name: x if isinstance(x, list) else round(x, 4) for name, x in found.items()})
    source = {"recipe": vars(recipe), "held out": found, "dtype": str(model.dtype).removeprefix("torch.")}
    print("wrote", network.save(place.out or processor_path(model), model, source))


if __name__ == "__main__":
    run(main)

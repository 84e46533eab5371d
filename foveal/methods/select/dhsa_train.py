"""Train DHSA's boundary predictor on a model's own attention; the model stays as it is.

`python -m foveal.methods.select.dhsa_train [--model M] [--texts N] [--out FILE]`

A gap is a boundary where later queries look at least twice as much at one side of it as at the other, on the average of a layer's heads.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...attach import attach
from ...command import Command, run
from ...data import book
from ...hub import model_identity
from ...method import Method
from ...model_info import ModelInfo
from ...tasks import get_task
from ...tasks.task import encode
from .boundaries import WINDOW, BoundaryPredictor, best_starts, boundary_ratio, soft_label
from .dhsa import Dhsa
from .learned import Learned, learned_path

GAMMA, POSITIVE = 2.0, 1.3
"""Focus of the loss on hard gaps, and the weight of boundaries in it (the paper's)."""
LENGTHS = (512, 1024, 2048)


class Example(NamedTuple):
    """One layer of one text: keys [tokens, channels] before rotary positions, and the label of each token as the start of a chunk."""

    keys: Tensor
    label: Tensor


@dataclass(frozen=True, eq=False)
class Probe(Method):
    """Collects examples from the layers `take` of every prompt that is read."""

    take: tuple[int, ...]
    found: list[Example] = field(default_factory=list)

    def where(self, model) -> tuple[int, ...]:
        return self.take

    def after(self, step) -> None:
        if step.decode:
            return
        mean = torch.cat(
            [step.scores(start=a, stop=min(a + 256, step.L))[0].softmax(-1).mean(0) for a in range(0, step.L, 256)]
        )
        position = step.q_token[:, None].expand(-1, step.G, -1)
        keys = step.model.rope.unrotate(step.k_new, position, step.layer)[0].transpose(0, 1).flatten(1)
        label = soft_label(boundary_ratio(mean.float())) >= 0.5
        self.found.append(Example(keys.half(), label))


@torch.no_grad()
def collect(model, texts: Sequence[Sequence[int]], every: int) -> list[Example]:
    """Examples of every so many layers of texts, token ids each."""
    probe = Probe(ModelInfo.of(model).layers[::every])
    with attach(model, probe):
        for ids in texts:
            model.get_decoder()(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return probe.found


def counted(length: int, window: int = WINDOW) -> slice:
    """Starts that have a label: gaps at least 2 * window from either end."""
    return slice(2 * window, length - 2 * window + 1)


def focal_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy weighed by how wrong a gap is, to the power `GAMMA`, boundaries by `POSITIVE`; mean over gaps."""
    p, log = torch.sigmoid(logits), nn.functional.logsigmoid
    yes = POSITIVE * (1 - p) ** GAMMA * -log(logits)
    no = p**GAMMA * -log(-logits)
    return torch.where(label, yes, no).mean()


def train(
    examples: Sequence[Example],
    *,
    rate: float = 1e-4,
    epochs: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> BoundaryPredictor:
    """One predictor for all layers, by Adam over examples in random order (paper: rate 1e-4, 2 epochs)."""
    torch.manual_seed(seed)
    first = examples[0].keys
    predictor = BoundaryPredictor(first.shape[1]).to(first.device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=rate)
    for epoch in range(epochs):
        total = 0.0
        for n, i in enumerate(torch.randperm(len(examples)).tolist(), 1):
            keys, label = examples[i]
            at, w = counted(len(label)), predictor.window
            loss = focal_loss(predictor(keys[at.start - w : at.stop + w - 1].float()), label[at])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item()
            if n % 100 == 0 or n == len(examples):
                progress(f"epoch {epoch}, {n} of {len(examples)} examples: loss {total / n:.4f}")
    return predictor.eval()


@torch.no_grad()
def examine(predictor: BoundaryPredictor, examples: Sequence[Example]) -> dict[str, float]:
    """Of the starts that inference would choose, the share with a boundary label (precision), and that of all gaps (chance)."""
    plain, hits, chance = Dhsa(boundaries="even"), [], []
    for keys, label in examples:
        at, w = counted(len(label)), predictor.window
        scores = predictor(keys[at.start - w : at.stop + w - 1].float())
        chosen = best_starts(scores, max(1, plain.chunks * len(label) // plain.block), plain.distance)
        hits.append(label[at][chosen].float().mean().item())
        chance.append(label[at].float().mean().item())
    return {"precision": round(sum(hits) / len(hits), 4), "chance": round(sum(chance) / len(chance), 4)}


def texts_for(tokenizer, n: int, seed: int, positions: int | None) -> list[tuple[int, ...]]:
    """Prose and questions about it in turn, of the lengths in `LENGTHS`."""
    rng, whole, texts = random.Random(f"dhsa/{seed}"), book(), []
    for i in range(n):
        length = min(LENGTHS[i // 2 % len(LENGTHS)], positions or max(LENGTHS))
        if i % 2:
            sample = get_task("needle").samples(tokenizer, length, i + 1, seed=seed, positions=positions)[i]
            texts.append((*sample.context, *sample.question))
            continue
        start = rng.randrange(len(whole) - 8 * length)
        texts.append(tuple(encode(tokenizer, whole[start : start + 8 * length], special=True)[:length]))
    return texts


def main(arguments: Sequence[str] | None = None) -> None:
    command = Command(__spec__.name, __doc__)
    command.add_argument("--texts", type=int, default=60, help="texts to learn from; a tenth as many to examine")
    command.add_argument("--every", type=int, default=3, help="take every so many layers")
    command.add_argument("--epochs", type=int, default=2)
    command.add_argument("--rate", type=float, default=1e-4)
    command.add_argument("--seed", type=int, default=0)
    place, chosen = command.read(arguments)
    model, tokenizer = place.load()
    positions, start = ModelInfo.of(model).max_positions, time.perf_counter()
    examples = collect(model, texts_for(tokenizer, chosen.texts, chosen.seed, positions), chosen.every)
    print(f"{len(examples)} examples after {time.perf_counter() - start:.0f} s", flush=True)
    how = {"rate": chosen.rate, "epochs": chosen.epochs, "seed": chosen.seed}
    predictor = train(examples, **how, progress=lambda line: print(line, flush=True))
    held_out = texts_for(tokenizer, max(2, chosen.texts // 10), chosen.seed + 1, positions)
    found = examine(predictor, collect(model, held_out, chosen.every))
    print(json.dumps(found))
    source = {"texts": chosen.texts, "every": chosen.every, **how, "held out": found}
    learned = Learned("dhsa", model_identity(model), predictor.state_dict(), {"window": WINDOW}, source)
    print("wrote", learned.save(place.out or learned_path(model, "dhsa")), f"in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run(main)

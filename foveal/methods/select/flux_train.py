"""Train the routers of Flux Attention for a model that stays as it is.

`python -m foveal.methods.select.flux_train [--model M] [--length N] [--steps N] [--out FILE]`

On tasks whose answer lies far back a share of the layers should become sparse, on plain text all; how hard that counts is learned too, by
gradient ascent (the paper's Lagrangian).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...attach import attach
from ...command import Command, run
from ...errors import InputError
from ...hub import model_identity
from ...method import Method, Out
from ...model_info import ModelInfo
from ...tasks import get_task
from ...tasks.task import encode
from .flux import WIDTH, Router, pooled_query
from .learned import Learned, learned_path

TARGETS = {"needle": 0.45, "passkey": 0.45, "niah_multikey_1": 0.45, "vt": 0.45, "perplexity": 1.0}
"""Tasks to learn from, and the share of layers that should become sparse on each (the paper: questions 0.45, all else 1)."""


class Text(NamedTuple):
    """Token ids: the prompt, which routers see, and what must be said after it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """How to train; defaults are those of the paper's script but for `sink`, `recent` and `pool`, which suit `length` tokens."""

    length: int = 1024
    sink: int = 16
    recent: int = 112
    pool: int = 100
    width: int = WIDTH
    steps: int = 300
    batch: int = 10  # texts a step, in turn from all tasks (the paper: 48 of 64k tokens)
    rate: float = 5e-4
    dual_rate: float = 1e-3
    clip: float = 5.0
    weight_decay: float = 0.1
    warm: float = 1.5  # temperature at the start; 1 from `cool` of the steps on
    cool: float = 0.6
    seed: int = 0

    def temperature(self, step: int) -> float:
        """Cosine from `warm` to 1 over the share `cool` of the steps."""
        part = min(1.0, step / max(1, self.cool * self.steps))
        return 1 + (self.warm - 1) * (1 + math.cos(math.pi * part)) / 2


@dataclass(frozen=True, eq=False)
class Mixed(Method):
    """While a router learns: every layer computes both attentions and takes z of the full one, 1 - z of the sparse one.

    decided[layer] = z, a number of 0 or 1 with the gradient of its relaxation. now: tokens of the prompt, temperature, noise or not, and
    what `force` puts in the place of z.
    """

    routers: nn.ModuleDict
    settings: Settings
    decided: dict[int, Tensor] = field(default_factory=dict)
    now: dict = field(default_factory=dict)

    def attend(self, step, selection, bias) -> Out:
        s, now = self.settings, self.now
        logits = self.routers[str(step.layer)](pooled_query(step, s.pool, now["prompt"]))[0]
        self.decided[step.layer] = z = decide(logits, now["temperature"], now["noise"])
        z = z if now.get("force") is None else torch.full_like(z, now["force"])
        how = {"scale": step.logit.scale, "softcap": step.logit.softcap, "sinks": step.logit.sinks}
        full = ops.attend(step.q, step.k_new, step.v_new, **how)[0]
        sparse = ops.attend_band(step.q, step.k_new, step.v_new, sink=s.sink, recent=s.recent, **how)[0]
        z = z.to(full.dtype)
        return Out(z * full + (1 - z) * sparse)


def decide(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """1 where full attention wins among logits [2], else 0, with the gradient of the soft decision; noise: Gumbel [2] or None."""
    noisy = logits if noise is None else logits + noise
    soft = (noisy / temperature).softmax(-1)[1]
    return (noisy.argmax(-1) == 1).to(soft.dtype) + soft - soft.detach()


def penalty(sparsity: Tensor, target: float, dual: Tensor) -> Tensor:
    """The Lagrangian term of one text: dual[0] * |d| + dual[1] * d^2 with d = sparsity - target."""
    d = sparsity - target
    return dual[0] * d.abs() + dual[1] * d * d


def train(
    model,
    texts: dict[str, Sequence[Text]],
    targets: dict[str, float],
    settings: Settings,
    progress: Callable[[str], None] = lambda line: None,
) -> nn.ModuleDict:
    """Routers by layer, trained on texts of each task; the model's weights are not touched.

    Raises InputError for a task without texts.
    """
    if empty := [name for name in targets if not texts.get(name)]:
        raise InputError(f"no texts for {', '.join(empty)}: give some for each task that has a target")
    info, names = ModelInfo.of(model), [*targets]
    torch.manual_seed(settings.seed)
    routers = nn.ModuleDict({str(i): Router(info.head_dim, settings.width) for i in info.layers}).to(model.device)
    dual = {name: (torch.rand(2) * 0.5).to(model.device).requires_grad_() for name in names}
    how = {"betas": (0.9, 0.95), "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(routers.parameters(), lr=settings.rate, **how)
    ascent = torch.optim.Adam([*dual.values()], lr=settings.dual_rate, maximize=True)
    mixed = Mixed(routers, settings)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        with attach(model, mixed):
            for step in range(settings.steps):
                batch = [(names[i % len(names)], step * settings.batch + i) for i in range(settings.batch)]
                share = {name: 1 / (len({n for n, _ in batch}) * sum(n == name for n, _ in batch)) for name, _ in batch}
                total = {"loss": 0.0, "sparsity": 0.0}
                for name, i in batch:
                    text = texts[name][i // len(names) % len(texts[name])]
                    mixed.now.update(temperature=settings.temperature(step), noise=_gumbel(model.device))
                    loss = answer_loss(model, mixed, text)
                    sparsity = 1 - torch.stack([*mixed.decided.values()]).mean()
                    (loss / len(batch) + share[name] * penalty(sparsity, targets[name], dual[name])).backward()
                    total["loss"] += loss.item() / len(batch)
                    total["sparsity"] += sparsity.item() / len(batch)
                nn.utils.clip_grad_norm_(routers.parameters(), settings.clip)
                for o in (optimizer, ascent):
                    o.step()
                    o.zero_grad(set_to_none=True)
                if step % 20 == 0 or step + 1 == settings.steps:
                    progress(f"step {step}: loss {total['loss']:.3f}, sparse layers {total['sparsity']:.2f}")
    finally:
        for p, wanted in frozen:
            p.requires_grad_(wanted)
    return routers.eval()


def _gumbel(device) -> Tensor:
    return -torch.empty(2, device=device).exponential_().log()


def answer_loss(model, mixed: Mixed, text: Text) -> Tensor:
    """Mean nats per token of the answer after the prompt; the routers see the prompt alone."""
    mixed.now["prompt"] = len(text.prompt)
    ids = torch.tensor([[*text.prompt, *text.answer]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(text.answer) + 1).logits[0, :-1]
    return nn.functional.cross_entropy(logits.float(), ids[0, len(text.prompt) :])


@torch.no_grad()
def examine(model, routers: nn.ModuleDict, texts: dict[str, Sequence[Text]], settings: Settings) -> dict[str, dict]:
    """For each task: the share of full layers, and the nats per answer token as routed, all full and all sparse."""
    found, mixed = {}, Mixed(routers, settings)
    with attach(model, mixed):
        for name, some in texts.items():
            rows = []
            for text in some:
                mixed.now.update(temperature=1.0, noise=None)
                row = []
                for force in (None, 1.0, 0.0):
                    mixed.now["force"] = force
                    row.append(answer_loss(model, mixed, text).item())
                    if force is None:
                        full = torch.stack([*mixed.decided.values()]).round().mean().item()
                rows.append((full, *row))
            mean = torch.tensor(rows).mean(0).tolist()
            found[name] = dict(
                zip(("full layers", "routed", "full", "sparse"), (round(x, 4) for x in mean), strict=True)
            )
    return found


def texts_of(tokenizer, task: str, length: int, n: int, seed: int, positions: int | None) -> list[Text]:
    """Samples of a task as texts whose routers see the question; the answer of a generating task is its first target."""
    texts, kind = [], get_task(task).kind
    for s in get_task(task).samples(tokenizer, length, n, seed=seed, positions=positions):
        prompt = (*s.context, *s.question)
        if kind == "nll":
            texts.append(Text(prompt, tuple(s.target)))
            continue
        target = s.target if isinstance(s.target, str) else ", ".join(s.target)
        lead = "" if tokenizer.decode(prompt[-1:])[-1:].isspace() else " "
        texts.append(Text(prompt, tuple(encode(tokenizer, lead + target))))
    return texts


def main(arguments: Sequence[str] | None = None) -> None:
    command = Command(__spec__.name, __doc__)
    command.add_argument("--texts", type=int, default=200, help="texts of each task to learn from")
    command.add_argument("--held-out", type=int, default=20, help="texts of each task to examine the routers on")
    command.add_argument("--tasks", default=",".join(TARGETS), help="of these tasks, between commas")
    numbers = ("length", "sink", "recent", "pool", "width", "steps", "batch", "seed", "rate", "dual_rate")
    command.add_settings(Settings(), *numbers)
    place, chosen = command.read(arguments)
    if unknown := [task for task in chosen.tasks.split(",") if task not in TARGETS]:
        command.error(f"no target is known for {', '.join(unknown)}: choose from {', '.join(TARGETS)}")
    settings = Settings(**{name: getattr(chosen, name) for name in numbers})
    model, tokenizer = place.load()
    positions, start = ModelInfo.of(model).max_positions, time.perf_counter()
    targets = {task: TARGETS[task] for task in chosen.tasks.split(",")}
    draw = lambda n, seed: {t: texts_of(tokenizer, t, settings.length, n, seed, positions) for t in targets}
    texts = draw(chosen.texts, settings.seed)
    print(f"{sum(map(len, texts.values()))} texts after {time.perf_counter() - start:.0f} s", flush=True)
    routers = train(model, texts, targets, settings, lambda line: print(line, flush=True))
    found = examine(model, routers, draw(chosen.held_out, settings.seed + 1), settings)
    print(json.dumps(found, indent=1))
    weights = {f"{i}.{name}": x for i, router in routers.items() for name, x in router.state_dict().items()}
    kept = {name: getattr(settings, name) for name in ("sink", "recent", "pool", "width")}
    source = {
        "length": settings.length,
        "steps": settings.steps,
        "batch": settings.batch,
        "rate": settings.rate,
        "targets": targets,
        "held out": found,
    }
    learned = Learned("flux", model_identity(model), weights, kept, source)
    print("wrote", learned.save(place.out or learned_path(model, "flux")), f"in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run(main)

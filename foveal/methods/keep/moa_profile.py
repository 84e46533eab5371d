"""Measure what MoA rests on: how much the answer's loss depends on what each head sees, by distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...attach import attach
from ...heads import HeadRoles
from ...hub import model_identity
from ...method import Method
from ...model_info import ModelInfo
from ...tasks import get_task
from .moa_search import hidden_name
from .profiles import command, greedy
from .scoring import attention

LENGTHS, UNSEEN = (512, 1024), 768
"""Measured lengths and the one held out to choose among plans, for models of 2,000 and more positions; paper: 2k, 4k, 8k and 12k."""
SAMPLES = 5
BLOCK = 64


@dataclass(frozen=True, eq=False)
class InfluenceProbe(Method):
    """Adds up, while gradients flow back, the influence of each pair of blocks: total[layer] = [heads, blocks, blocks]."""

    block: int
    blocks: int
    total: dict[int, Tensor] = field(default_factory=dict)

    def mix(self, step, out: Tensor) -> Tensor:
        if not step.decode:
            out.register_hook(lambda grad: self._add(step, grad))
        return out

    @torch.no_grad()
    def _add(self, step, grad: Tensor) -> None:
        value = step.per_head(step.store.values())
        total = self.total.setdefault(step.layer, torch.zeros(step.H, self.blocks, self.blocks))
        for i, start in enumerate(range(0, step.L, self.block)):
            stop = min(start + self.block, step.L)
            weights = attention(step, start, stop)
            found = influence(weights, grad[:, :, start:stop] @ value.mT)[0].sum(1)  # [heads, T]
            found = torch.nn.functional.pad(found, (0, self.blocks * self.block - step.T))
            total[:, i] += found.unflatten(1, (self.blocks, self.block)).sum(-1).cpu()


def influence(weights: Tensor, grad: Tensor) -> Tensor:
    """How much the loss changes, to first order, when one weight is removed and its row brought back to a sum of one, without sign.

    weights: attention rows [..., queries, keys].  grad: the gradient of the loss by these weights. A row of one key counts its own.
    """
    change = weights * (grad - (grad * weights).sum(-1, keepdim=True)) / (1 - weights).clamp(min=1e-6)
    alone = weights.amax(-1, keepdim=True) >= 1 - 1e-6
    return torch.where(alone, weights * grad, change).abs()


def hidden_by(total: Tensor, window: int) -> Tensor:
    """The influence of the pairs that a window of so many blocks and the first block hide: total [heads, blocks, blocks] to [heads]."""
    n = total.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return (total * ((i - j >= window) & (j > 0))).sum((1, 2))


def measure(
    model,
    tokenizer,
    progress: Callable[[str], None] = lambda line: None,
    *,
    lengths: Sequence[int] = LENGTHS,
    unseen: int = UNSEEN,
    samples: int = SAMPLES,
    block: int = BLOCK,
    seed: int = 0,
) -> HeadRoles:
    """The scores "hidden:LENGTH:BLOCKS" of each head, mean of `samples` questions about a needle in a text, answered by the model
    itself; the loss is that of its answer. At each length the least window hides 1 on average. Gradients flow to no weight.
    """
    info = ModelInfo.of(model)
    scores: dict[str, Tensor] = {}
    for length in (*lengths, unseen):
        probe = InfluenceProbe(block, -(-length // block))
        task = get_task("needle")
        for run in task.samples(tokenizer, length, samples, seed=seed, positions=info.max_positions):
            prompt = [*run.context, *run.question]
            with torch.no_grad(), attach(model) as session:
                answer = list(greedy(session, tokenizer, prompt, task.max_new_tokens))
            _backward(model, probe, prompt, answer)
            progress(f"{length:,} tokens: {tokenizer.decode(answer).strip()!r}, the needle is {run.target}")
        windows = [
            torch.stack(
                [
                    hidden_by(probe.total[i], n) if i in probe.total else torch.zeros(info.heads)
                    for i in range(info.n_layers)
                ]
            )
            for n in range(1, probe.blocks - 1)
        ]
        scale = windows[0][list(info.layers)].mean()
        for n, x in enumerate(windows, 1):
            scores[hidden_name(length, n)] = (x / scale).round(decimals=4)
    source = {"lengths": list(lengths), "unseen": unseen, "samples": samples, "block": block, "seed": seed}
    return HeadRoles(model_identity(model), scores, source, info.layers)


def _backward(model, probe: InfluenceProbe, prompt: list[int], answer: list[int]) -> None:
    """Bring the gradient of the answer's mean loss to the head outputs."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in frozen:
            p.requires_grad_(False)
        embedded = model.get_input_embeddings()(ids).requires_grad_(True)
        with torch.enable_grad(), attach(model, probe):
            logits = model(inputs_embeds=embedded, logits_to_keep=len(answer) + 1).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits.float(), ids[0, len(prompt) :]).backward()
    finally:
        for p, needed in frozen:
            p.requires_grad_(needed)


if __name__ == "__main__":
    command("moa", "Measure the influence profile of a model for the method moa.", measure)

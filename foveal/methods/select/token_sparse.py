"""Token Sparse Attention: in layers that change little, tokens that nobody looks at take no part in a prompt, as keys or as queries."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...excerpt import Excerpt
from ...method import Method, check_count, check_range, method
from ...ops.scores import window_scores
from ...ops.top import top_slots
from ...selection import All, Selection
from ...verify import Claim, StaysNear
from ..keep.scoring import check_window, smoothed
from .block_maps import is_whole_prompt
from .drift import drift_for, stable_layers


@method(
    "token-sparse",
    paper="Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection (2026) [133]",
    claim=Claim(
        "Attention of 128k tokens up to 3.23x faster at less than 1 % loss of accuracy, on top of dense and of sparse kernels.",
        number="Llama 3.1 8B and Mistral Nemo: up to 3.23 times as fast at 128k, accuracy within 1 %",
        experiments=(
            StaysNear("token-sparse(least=64, window=32)", "needle", within=0.05, n=16, query_aware=True),
            StaysNear("token-sparse(least=64, window=32)", "perplexity", within=0.01),
        ),
        setting="1 % read as 0.01 nats; window and floor scaled to 1,024 tokens, the question in the prompt; accuracy alone",
    ),
)
@dataclass(frozen=True)
class TokenSparse(Method):
    """While a prompt is read, each query head drops the tokens that its last `window` queries look at least; the rest attends among itself,
    and what was dropped gets a head output of zero. The next layer chooses anew, and all keys stay for decode, which is dense.

    drop: how much of the attention may be dropped, over all heads of the layer (paper: 0.005); all heads drop equally many tokens, at
    least `least` of them beside the window stay (paper: 1,024). Weights are averaged over `kernel` neighbours (paper: 7). The number
    that stays is read back from the device once a layer, for it fixes shapes.
    layers: "late", the second half (the paper's fallback); "stable", those whose hidden states changed least on a long text, half of
    them (the paper's rule), measured with `python -m foveal.methods.select.drift`; or indices.
    Methods to the right of it read the shortened text: token-sparse | xattention.
    """

    drop: float = 0.005
    least: int = 1024
    window: int = 128
    kernel: int = 7
    layers: str | Sequence[int] = "late"

    needs = frozenset({"whole_prompt"})
    neutral = {"drop": 0.0}
    example = {"drop": 0.3, "least": 8, "window": 8, "kernel": 3}

    def __post_init__(self) -> None:
        check_range("drop", self.drop, 0, 1)
        check_count("least", self.least)
        check_window(self.window, self.kernel)
        if isinstance(self.layers, str):
            if self.layers not in ("late", "stable"):
                raise InputError(f"layers = {self.layers!r}: expected 'late', 'stable' or indices like (8, 9, 10)")
            return
        if not self.layers:
            raise InputError("layers = (): expected 'late', 'stable' or indices like (8, 9, 10)")
        for i in self.layers:
            check_count("layers", i)
        object.__setattr__(self, "layers", tuple(self.layers))  # a session's signature is hashed

    def where(self, model) -> tuple[int, ...]:
        if self.layers == "late":
            return model.layers[len(model.layers) // 2 :]
        if self.layers == "stable":
            return stable_layers(drift_for(model.model), model.layers)
        if beyond := [i for i in self.layers if i not in model.layers]:
            raise InputError(
                f"layers = {self.layers}: the model has no full attention in {beyond}; it has in {model.layers}"
            )
        return tuple(self.layers)

    def select(self, step) -> Selection:
        if self.drop == 0 or not is_whole_prompt(step, self.least + self.window):
            return All()
        weight, stay = self.scored(step)
        older = step.L - self.window
        if stay >= older:
            return All()
        chosen = top_slots(weight.flatten(0, 1), max(1, stay)).long().unflatten(0, (1, step.H))[..., :stay]
        newest = torch.arange(older, step.L, device=step.device).expand(1, step.H, -1)
        return Excerpt.of(step, torch.cat([chosen, newest], 2))

    def scored(self, step) -> tuple[Tensor, int]:
        """Shares of the attention of the tokens before the window, [1, heads, tokens], and how many of them each head keeps."""
        older = step.L - self.window
        seen, _ = window_scores(step.q, step.k_new, self.window, scale=step.scale, softcap=step.logit.softcap)
        weight = smoothed(seen[..., :older].contiguous(), self.kernel, "avg")
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
        together = weight.mean(1)[0].double().sort().values
        below = int((together.cumsum(0) / together.sum() < self.drop).sum())
        return weight, max(self.least, older - below - 1) if below else older  # with the token that crosses the line

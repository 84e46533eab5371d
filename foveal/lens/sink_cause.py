"""What makes a token a sink: the feed-forward block that writes along the first token's direction (Secondary Attention Sinks 2025 [16])."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModel
from ..method import check_count, check_range
from ..model_info import ModelInfo
from .reading import _blocks, tokens_of

STAGES = ("input", "gate", "up", "activation", "product", "output")
"""Of a gated feed-forward block: what enters, both projections, act(gate), act(gate) * up, and after the down-projection."""


@dataclass(frozen=True, eq=False)
class Stages:
    """One block's feed-forward on one text: states[stage] [length, width of the stage], float32; ids: the text's tokens."""

    ids: tuple[int, ...]
    states: dict[str, Tensor]

    def cosine(self, stage: str, with_: int = 0) -> Tensor:
        """Of every token with token `with_` at a stage, [length]."""
        x = self.states[stage]
        return F.cosine_similarity(x, x[with_][None], dim=-1)

    def aligned(self, sinks: Sequence[int], with_: int = 0) -> dict[str, tuple[float, float]]:
        """stage -> (mean cosine of the sinks, of controls) with the primary sink: sinks turn to it only at "output", if the paper is right.

        Controls are the other places of the sinks' own tokens; NaN where there are none. Raises InputError without sinks.
        """
        if not sinks:
            raise InputError("expected at least one sink, got none: take them from the lens 'secondary-sinks'")
        kinds = {self.ids[t] for t in sinks}
        others = [t for t, i in enumerate(self.ids) if i in kinds and t not in sinks and t != with_]
        found = {}
        for stage in STAGES:
            x = self.cosine(stage, with_)
            found[stage] = float(x[list(sinks)].mean()), float(x[others].mean())
        return found


@torch.no_grad()
def mlp_stages(model, tokenizer, text: str | Sequence[int], layer: int) -> Stages:
    """The stages of block `layer`'s gated feed-forward (gate_proj, up_proj, down_proj) on one text, read in one pass.

    Raises UnsupportedModel where the block has no such parts, InputError for what `foveal.lens.look` refuses.
    """
    info = ModelInfo.of(model)
    ids, mlp = tokens_of(model, tokenizer, text, info), _mlp(model, info, layer)
    states: dict[str, Tensor] = {}

    def keep(name: str, entering: bool = False):
        def hook(module, args, output) -> None:
            states[name] = (args[0] if entering else output)[0].float().cpu()

        return hook

    watched = [(mlp, keep("input", True)), (mlp.gate_proj, keep("gate")), (mlp.up_proj, keep("up"))]
    watched += [(mlp.down_proj, keep("product", True)), (mlp.down_proj, keep("output"))]
    handles = [m.register_forward_hook(hook) for m, hook in watched]
    try:
        model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    states["activation"] = mlp.act_fn(states["gate"])
    return Stages(tuple(ids), states)


@torch.no_grad()
def written(
    model, layer: int, inputs: Tensor, along: Tensor, scales: Sequence[float], count: int = 3
) -> tuple[Tensor, Tensor]:
    """(norm, cosine with `along`), both [count, scales], of what block `layer`'s feed-forward writes for scaled principal directions.

    inputs: its inputs at sinks, [sinks, width], at least two; their directions are centred, the first `count` of them are taken (fewer if
    they span fewer), each with the sign that points to the inputs' mean.  along: what it writes for the first token, [width].
    """
    mlp = _mlp(model, ModelInfo.of(model), layer)
    if inputs.ndim != 2 or len(inputs) < 2:
        raise InputError(f"expected inputs [sinks, width] of at least two sinks, got {list(inputs.shape)}")
    check_count("count", count, 1)
    x = inputs.double().cpu()
    mean = x.mean(0)
    _, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    v = v[: min(count, int((s > 1e-5 * s[0]).sum()))]
    v = v * torch.where(v @ mean < 0, -1.0, 1.0)[:, None]
    weight = mlp.down_proj.weight
    scaled = (torch.tensor(scales, dtype=torch.double)[None, :, None] * v[:, None]).to(weight.device, weight.dtype)
    out = mlp(scaled).float().cpu()
    return out.norm(dim=-1), F.cosine_similarity(out, along.float().cpu(), dim=-1)


@contextmanager
def clamped(
    model, layer: int, along: Tensor, *, cosine: float = 0.98, size: float = 100.0, first: int = 3
) -> Iterator[None]:
    """Inside, what block `layer`'s feed-forward writes along the first token's direction has a fixed norm, which shortens sinks' lives.

    along: what it writes for the first token, [width] (`mlp_stages(...).states["output"][0]`).  Rows of a prompt with a larger cosine
    than `cosine` (0.98) are scaled to the norm `size` (100), the first `first` (3) tokens excepted; single tokens in decode are left alone.
    For one forward pass over a whole prompt.
    """
    check_range("cosine", cosine, -1, 1)
    check_range("size", size, 0)
    check_count("first", first)
    mlp = _mlp(model, ModelInfo.of(model), layer)

    def hook(module, args, output):
        if output.shape[1] == 1:
            return output
        x = output.float()
        near = F.cosine_similarity(x, along.to(x), dim=-1) > cosine
        near[:, :first] = False
        scaled = x * (size / x.norm(dim=-1, keepdim=True).clamp(min=1e-30))
        return torch.where(near[..., None], scaled.to(output.dtype), output)

    handle = mlp.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _mlp(model, info: ModelInfo, layer: int) -> nn.Module:
    check_count("layer", layer)
    if layer >= info.n_layers:
        raise InputError(f"layer = {layer}: this model has layers 0 to {info.n_layers - 1}")
    mlp = getattr(_blocks(model, info.n_layers)[layer], "mlp", None)
    if not all(hasattr(mlp, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        raise UnsupportedModel(
            f"{type(model).__name__} has no gated feed-forward with gate_proj, up_proj and down_proj in block {layer}: use a model with one"
        )
    return mlp

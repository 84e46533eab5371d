"""Bottlenecked Transformer: when a line of reasoning ends, a small trained network rewrites what the cache holds of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...edits import Plane
from ...errors import InputError
from ...hub import model_identity
from ...known import known_file, own_file
from ...method import Method, check_count, method
from ...verify import Claim
from .words import tokenizer_of

GATE = -4.0  # what a layer's gate begins with, before its sigmoid


class Processor(nn.Module):
    """One small Transformer block without a causal mask for each layer of the backbone; none sees another's keys.

    size 2 * kv_heads * head_dim: what one token's keys and values are together.  width, inner, heads: of the blocks (paper: 512, 2,240,
    16). Raises InputError where the heads do not divide the width.
    """

    def __init__(self, layers: int, size: int, width: int = 512, inner: int = 2240, heads: int = 16):
        super().__init__()
        if width % heads:
            raise InputError(f"width = {width}: expected a multiple of the {heads} heads")
        self.shape = {"layers": layers, "size": size, "width": width, "inner": inner, "heads": heads}
        self.heads = heads
        weight = lambda a, b: nn.Parameter(torch.randn(layers, a, b) * a**-0.5)
        self.enter, self.leave = weight(size, width), weight(width, size)
        self.qkv, self.out = weight(width, 3 * width), weight(width, width)
        self.up, self.down = weight(width, inner), weight(inner, width)
        self.norms = nn.Parameter(torch.ones(2, layers, 1, width))
        self.gate = nn.Parameter(torch.full((layers, 1, 1), GATE))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the chosen tokens of each layer: [layers, tokens, size] to the same."""
        u = x @ self.enter
        u = u + self._attend(self._norm(u, 0))
        u = u + F.gelu(self._norm(u, 1) @ self.up) @ self.down
        return self.gate.sigmoid() * (u @ self.leave)

    def _norm(self, u: Tensor, which: int) -> Tensor:
        return F.layer_norm(u, u.shape[-1:]) * self.norms[which]

    def _attend(self, u: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (u @ self.qkv).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ self.out

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path, model, source: dict) -> Path:
        """Write the weights (in bfloat16), which model they are for and how they were made."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"identity": model_identity(model), "shape": self.shape, "source": source}
        weights = {name: x.detach().to("cpu", torch.bfloat16).contiguous() for name, x in self.state_dict().items()}
        save_file(weights, path, metadata={"foveal": json.dumps(about)})
        return path

    @staticmethod
    def load(path: str | Path, model) -> Processor:
        """Read what `save` wrote; raises InputError where there is no such file, it is damaged or of another model."""
        try:
            with safe_open(Path(path).expanduser(), "pt") as file:
                about = json.loads(file.metadata()["foveal"])
                weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"expected a trained processor, but '{path}' cannot be read as one ({error}): check the path"
            ) from error
        if about["identity"]["weights"] != model_identity(model)["weights"]:
            raise InputError(
                f"the processor in '{path}' was trained for {about['identity']['name']}: train this model's own"
            )
        processor = Processor(**about["shape"])
        processor.load_state_dict(weights)
        return processor.to(model.device).eval().requires_grad_(False)


def processor_path(model) -> Path:
    """Where a user's own processor for this model is kept."""
    return own_file(model, "bottlenecked", ".safetensors")


def processor_for(model) -> Processor:
    """The processor that ships for this model, else the user's own."""
    path = known_file(model, "bottlenecked", ".safetensors", _made_for)
    if path is not None:
        return Processor.load(path, model)
    identity = model_identity(model)
    name = identity["name"] or identity["architecture"]
    raise InputError(
        f"no processor is known for {name}: train one with `python -m foveal.methods.keep.bottlenecked_train --model {name}`"
    )


def _made_for(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["foveal"])["identity"]


class Setup(NamedTuple):
    """What `setup` finds: the processor (None where nothing is to be rewritten), and the tokens that end a step."""

    processor: Processor | None
    ends: frozenset[int]


@method(
    "bottlenecked",
    paper="Bottlenecked Transformers: Periodic KV Cache Consolidation for Generalised Reasoning (2025) [2]",
    claim=Claim(
        "Rewriting the cache of a finished reasoning step, and of what it looked back to, makes small models reason better.",
        number="greedy answers, Llama 3.2 1B: SVAMP 38.0 to 44.6; 3B: GSM8K 46.8 to 51.3",
        untestable="the claim is one of a processor trained for the model on 128,000 worked solutions; its training command measures the "
        "next step's loss against the frozen model and against random rewriting of equal size",
    ),
)
@dataclass(frozen=True)
class Bottlenecked(Method):
    """When a token with a line break ends a step, the last `recent` tokens of the step and the `earlier` tokens before them that the step
    attended to most are rewritten in each layer: their keys and values, of all KV heads together, are one vector a token, to which the
    layer's block of a trained processor adds something. The cache keeps its size; everything else in it stays bit for bit.

    Attention is summed over heads and over the tokens of the step (of a prompt: over its last `recent`); a prompt is one step. Keys are
    rewritten as they are cached, with their positions. A prompt in chunks is rewritten at its end only.
    processor: a file of `python -m foveal.methods.keep.bottlenecked_train` (default: the one known for this model), or "random": untrained,
    wide open, the control.  newline: the token ids that end a step (default: all with a line break).
    """

    recent: int = 64
    earlier: int = 32
    processor: str | None = None
    newline: tuple[int, ...] | None = None

    planes = {"attended": Plane(0.0), "closed": Plane(0, torch.int8)}
    dense_prefill = True
    neutral = {"recent": 0, "earlier": 0, "newline": ()}
    example = {"recent": 6, "earlier": 4, "processor": "random", "newline": tuple(range(0, 128, 4))}

    def __post_init__(self) -> None:
        check_count("recent", self.recent)
        check_count("earlier", self.earlier)
        if self.newline is not None and not all(type(i) is int and i >= 0 for i in self.newline):
            raise InputError(f"newline = {self.newline!r}: expected token ids")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"col_mass:{self.recent}"}) if self.recent else frozenset()

    def setup(self, model) -> Setup:
        ends = frozenset(self._line_breaks(model.model) if self.newline is None else self.newline)
        if self.recent == 0:
            return Setup(None, ends)
        if self.processor == "random":
            return Setup(self.untrained(model), ends)
        known = self.processor is not None
        return Setup(Processor.load(self.processor, model.model) if known else processor_for(model.model), ends)

    @staticmethod
    def untrained(model, gate: float = 0.0, **shape: int) -> Processor:
        """A processor as it is before training, but for its gates; the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = Processor(
                len(model.layers),
                2 * model.kv_heads * model.head_dim,
                **(shape or {"width": 32, "inner": 64, "heads": 4}),
            )
        made.gate.data.fill_(gate)
        return made.to(model.model.device).eval().requires_grad_(False)

    @staticmethod
    def _line_breaks(model) -> list[int]:
        tokenizer = tokenizer_of(model)
        if tokenizer is None:
            raise InputError(
                "this model has no tokenizer that tells which tokens break a line: give their ids as `newline`"
            )
        return [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]

    def begin(self, pass_) -> None:
        layout = pass_.session.layout
        if layout is not None and layout.format is not None:
            raise InputError(
                f"'bottlenecked' rewrites keys in place, which codes ('{layout.format}') would round again: leave the format out"
            )

    def after(self, step) -> None:
        if self.recent:
            step.store.add("attended", step.group(step.stats["col_mass"], "sum"))

    def end(self, pass_) -> None:
        """Outside of any captured step: rewrite for the sequences that have just ended one."""
        if self.recent == 0 or not pass_.prompt_done:
            return
        plan = next(part.plan for parts in pass_.session.active.values() for part in parts if part.method is self)
        if pass_.ids is None:
            raise InputError(
                "'bottlenecked' looks for line breaks, but the model was given inputs_embeds: give input_ids"
            )
        for b, token in enumerate(pass_.ids[:, -1].tolist()):
            if token in plan.ends:
                self.rewrite(pass_.store.rows, b, plan.processor)

    def rewrite(self, layers: Sequence, b: int, processor: Processor) -> None:
        """Close the step of sequence b: layers are the rows of all layers."""
        chosen = [self.chosen(rows, b) for rows in layers]
        x = torch.stack([tokens_at(rows, b, slots) for rows, slots in zip(layers, chosen, strict=True)])
        y = x + processor(x.float()).to(x.dtype)
        for rows, slots, new in zip(layers, chosen, y, strict=True):
            put(rows, b, slots, new)
            close(rows, b)

    def chosen(self, rows, b: int) -> Tensor:
        """Slots of what is rewritten, in order of age, [kv_heads, tokens]: the same tokens in all KV heads."""
        token, valid = rows.token[b], rows.valid[b]
        if not bool((token == token[:1]).all()):
            raise InputError(
                "'bottlenecked' rewrites whole tokens, but KV heads hold different ones here: leave the other method out"
            )
        mine = (valid & (rows.plane("closed")[b] == 0))[0].nonzero()[:, 0]
        mine = mine[token[0, mine].argsort()][-self.recent :]
        before = valid[0] & (token[0] < token[0, mine[0]])
        mass = rows.plane("attended")[b].sum(0).masked_fill(~before, -math.inf)
        best = mass.topk(min(self.earlier, int(before.sum()))).indices
        slots = torch.cat([best, mine])
        return slots[token[0, slots].argsort()].expand(len(token), -1)


def close(rows, b: int) -> None:
    """The tokens held are of finished steps; the next one's attention is counted from zero."""
    for name, value in (("closed", 1), ("attended", 0)):
        plane = rows.plane(name).clone()
        plane[b] = value
        rows.set(name, plane)


# ---------------------------------------------------------------------- keys and values of some slots


def _at(rows, b: int, slots: Tensor) -> Tensor:
    """Slots of one sequence as slots of all rows; the others' first key stands for them."""
    every = slots.new_zeros(rows.batch, *slots.shape)
    every[b] = slots
    return every.flatten(0, 1)


def tokens_at(rows, b: int, slots: Tensor) -> Tensor:
    """Keys and values of all KV heads at slots [kv_heads, tokens] of sequence b, [tokens, 2 * kv_heads * head_dim]."""
    at, parts = _at(rows, b, slots), []
    for name in ("key", "value"):
        out = None
        for c in rows.classes:
            x = c.gather(name, c.pick(at))
            out = x.new_zeros(len(at), *x.shape[1:]) if out is None else out
            out[slice(None) if c.index is None else c.index] = x
        parts.append(out.unflatten(0, (rows.batch, -1))[b])
    return torch.cat(parts).transpose(0, 1).flatten(1)


def put(rows, b: int, slots: Tensor, x: Tensor) -> None:
    """Write what `tokens_at` read back to where it stood."""
    at, heads = _at(rows, b, slots), len(slots)
    new = x.unflatten(1, (2 * heads, -1)).transpose(
        0, 1
    )  # head sizes of keys and values are equal: both come of one model
    for name, part in (("key", new[:heads]), ("value", new[heads:])):
        for c in rows.classes:
            now = c.pick(at)
            old = c.gather(name, now)
            every = part.new_zeros(rows.batch, *part.shape)
            every[b] = part
            mine = torch.zeros(rows.batch, heads, 1, 1, dtype=torch.bool, device=x.device)
            mine[b] = True
            mine = c.pick(mine.flatten(0, 1))
            c.put(name, now, torch.where(mine, c.pick(every.flatten(0, 1)).to(old.dtype), old))
            c.pages.clear()

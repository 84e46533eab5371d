"""Head roles: which heads copy from far back. Calibrate them once for a model, save, load, refuse another model's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text
from torch import Tensor

from .errors import InputError, suggest
from .head_scores import COPIES, TEXTS, Password, copying, random_texts, repetition
from .hub import model_identity
from .known import known_file, made_for, own_file
from .method import check_range
from .model_info import ModelInfo

LENGTHS = (512, 1024, 2048)
"""Prompt lengths of the copying test, in tokens."""
RETRIEVAL = 0.1
"""A head with a retrieval score of at least this is a retrieval head (Wu et al. 2024)."""
PERIOD = 128
"""Random tokens that are repeated; the paper takes 2,500 (Tang et al. 2024), which few models have positions for."""

_FORMAT = "foveal head roles 1"
_MEANING = {
    "retrieval": "share of a needle's tokens that a head looked at most while they were copied, mean of the right runs",
    "activation": "share of the right runs in which a head copied at least one token",
    "induction": "attention to the tokens that followed earlier copies of the query's token, in repeated random tokens",
    "echo": "attention to the earlier copies themselves, in repeated random tokens",
}


@dataclass(frozen=True, eq=False)
class HeadRoles:
    """Named scores for each query head of one model.

    identity: `hub.model_identity` of the model.  scores: name -> [layers, heads] float32, 0 in layers that were not
    measured.  source: how they were measured.  measured: the layers (those with full attention), by default all.
    Raises InputError where scores and identity do not fit together.
    """

    identity: dict[str, Any]
    scores: dict[str, Tensor]
    source: dict[str, Any] = field(default_factory=dict)
    measured: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        layers, heads, name = (self.identity[key] for key in ("layers", "heads", "name"))
        scores = {key: torch.as_tensor(x, dtype=torch.float32) for key, x in self.scores.items()}
        object.__setattr__(self, "measured", tuple(self.measured) or tuple(range(layers)))
        object.__setattr__(self, "scores", scores)
        if not set(self.measured) <= set(range(layers)):
            raise InputError(f"expected measured layers below {layers}, got {list(self.measured)}: calibrate again")
        for key, x in scores.items():
            if tuple(x.shape) != (layers, heads) or not bool(x.isfinite().all()):
                raise InputError(
                    f"expected finite '{key}' scores [{layers}, {heads}], the layers and heads of {name}, got "
                    f"{list(x.shape)}: calibrate again"
                )

    # ------------------------------------------------------------------ reading

    def __getitem__(self, name: str) -> Tensor:
        """The scores of that name, [layers, heads]; raises InputError where there is none."""
        if name not in self.scores:
            raise InputError(f"no head score '{name}': {suggest(name, self.scores)}")
        return self.scores[name]

    def kv(self, name: str, kv_heads: int | None = None) -> Tensor:
        """Scores for each KV head, [layers, kv_heads]: the maximum over the query heads that share it."""
        x = self[name]
        kv_heads = self.identity["kv_heads"] if kv_heads is None else kv_heads
        if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads < 1 or x.shape[1] % kv_heads:
            raise InputError(f"expected a number of KV heads that divides {x.shape[1]} heads, got {kv_heads!r}")
        return x.unflatten(1, (kv_heads, -1)).amax(2)

    def top_share(self, name: str, share: float, kv_heads: int | None = None) -> Tensor:
        """The best `share` of the heads of all measured layers together, rounded up: bool [layers, heads or kv_heads].

        Ties go to the earlier layer and head, so that the number is exact. Raises InputError unless 0 < share <= 1.
        """
        check_range("share", share, 0, 1)
        if share == 0:
            raise InputError("share = 0: expected a share of the heads above 0 and up to 1")
        x = self[name] if kv_heads is None else self.kv(name, kv_heads)
        rows = list(self.measured)
        best = x[rows].flatten().argsort(descending=True, stable=True)
        chosen = torch.zeros(len(best), dtype=torch.bool)
        chosen[best[: math.ceil(share * len(best) - 1e-9)]] = True
        mask = torch.zeros(x.shape, dtype=torch.bool)
        mask[rows] = chosen.view(len(rows), -1)
        return mask

    def random_like(self, mask: Tensor, seed: int, *, per_layer: bool = False, outside: Tensor | None = None) -> Tensor:
        """A control for `mask`, bool [layers, heads or kv_heads]: as many heads, drawn from all measured layers.

        per_layer: as many in each layer instead, which also controls for depth.  outside: bool like `mask`, heads that
        are never drawn. Raises InputError where too few are left.
        """
        generator = torch.Generator().manual_seed(seed)
        mask, allowed = mask.cpu(), torch.zeros(mask.shape, dtype=torch.bool)
        allowed[list(self.measured)] = True
        if outside is not None:
            allowed &= ~outside.cpu()
        if not per_layer:
            return _draw(mask, allowed, generator)
        return torch.stack([_draw(mask[i], allowed[i], generator) for i in range(len(mask))])

    def best(self, name: str, n: int = 10) -> list[tuple[int, int, float]]:
        """The `n` best heads as (layer, head, score)."""
        flat, heads = self[name].flatten(), self.identity["heads"]
        return [(*divmod(i, heads), float(flat[i])) for i in flat.argsort(descending=True, stable=True)[:n].tolist()]

    # ------------------------------------------------------------------ files

    def for_model(self, model) -> HeadRoles:
        """Itself, if measured on this model, wherever that was loaded from; else InputError naming both."""
        here = model_identity(model)
        differs = [key for key in here if key != "name" and here[key] != self.identity.get(key)]
        if differs:
            name = _called(here)
            raise InputError(
                f"these head roles were measured on {_called(self.identity)}, but the model is {name} "
                f"({', '.join(differs)} differ): measure its own with `foveal heads {name}`"
            )
        return self

    def save(self, path: str | Path) -> Path:
        """Write a JSON file and the folders above it; `load` reads the same float32 values from it."""
        path = Path(path).expanduser()
        head = {"format": _FORMAT, "identity": self.identity, "source": self.source, "measured": self.measured}
        parts = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
        tables = ",\n".join(f"  {json.dumps(name)}: [\n{_rows(x)}\n  ]" for name, x in self.scores.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n" + ",\n".join([*parts, f' "scores": {{\n{tables}\n }}']) + "\n}\n", encoding="utf-8")
        return path

    @staticmethod
    def load(path: str | Path) -> HeadRoles:
        """Read what `save` wrote; raises InputError where there is no such file or it is damaged."""
        what = f"expected a file of head roles, but '{path}'"
        try:
            data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{what} cannot be read ({error.strerror}): check the path") from error
        except ValueError as error:
            raise InputError(f"{what} is not JSON ({error}): calibrate again") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise InputError(f"{what} does not say '{_FORMAT}': check the path")
        try:
            return HeadRoles(data["identity"], data["scores"], data["source"], tuple(data["measured"]))
        except InputError as error:
            raise InputError(f"'{path}': {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{what} is damaged ({error}): calibrate again") from error


def _called(identity: dict[str, Any]) -> str:
    return identity["name"] or identity["architecture"]


def _rows(x: Tensor) -> str:
    # numpy writes the shortest decimals that give the same float32 again
    return ",\n".join("   [" + ", ".join(str(np.float32(v)) for v in row) + "]" for row in x.tolist())


def _draw(like: Tensor, allowed: Tensor, generator: torch.Generator) -> Tensor:
    count, pool = int(like.sum()), allowed.flatten().nonzero().flatten()
    if count > len(pool):
        raise InputError(f"expected at least {count} heads to draw from, got {len(pool)}: exclude fewer")
    out = torch.zeros(like.numel(), dtype=torch.bool)
    out[pool[torch.randperm(len(pool), generator=generator)[:count]]] = True
    return out.view(like.shape)


def roles_path(model) -> Path:
    """Where the roles a user has calibrated for this model are kept."""
    return own_file(model, "heads", ".json")


def roles_for(model, path: str | Path | None = None) -> HeadRoles:
    """The roles of this model: those in `path`, else those that ship with Foveal, else those in `roles_path(model)`.

    Raises InputError where `path` is of another model, or where there are none yet.
    """
    if path is None:
        path = known_roles(model, "heads")
    if path is None:
        name = _called(model_identity(model))
        raise InputError(f"no head roles are known for {name}: measure them once with `foveal heads {name}`")
    return HeadRoles.load(path).for_model(model)


def known_roles(model, kind: str) -> Path | None:
    """The file of scores of this kind that is known for this model, if there is one: see `known_file`."""
    return known_file(model, kind, ".json", made_for)


# ---------------------------------------------------------------------- measuring


def calibrate(
    model,
    tokenizer,
    *,
    lengths: Sequence[int] | None = None,
    samples: int = 10,
    seed: int = 0,
    period: int = PERIOD,
    progress: Callable[[int, int], None] | None = None,
) -> HeadRoles:
    """Measure the head roles of a model: "retrieval" and "activation" by copying, "induction" and "echo" by repetition.

    Copying (Wu et al. 2024): a password of three words and a number in a novel, `samples` prompts of each of `lengths`,
    in tokens (default: those of LENGTHS the model has positions for). Runs with a ROUGE-1 recall above 0.5 count.
    Repetition (Tang et al. 2024): `period` random tokens, four times over.  progress: called with (done, planned) runs.
    Raises InputError for bad lengths and where no run was answered right, UnsupportedModel where attaching is refused.
    """
    info, identity = ModelInfo.of(model), model_identity(model)
    limit = info.max_positions or max(LENGTHS)
    lengths = tuple(n for n in LENGTHS if n <= limit) if lengths is None else tuple(lengths)
    if not lengths:
        raise InputError(f"expected at least one prompt length, up to the model's {limit:,} positions, got none")
    texts = random_texts(tokenizer, period, seed, limit)
    task = Password()
    runs = [s for n in lengths for s in task.samples(tokenizer, n, samples, seed=seed, positions=limit)]
    repeated = repetition(model, texts, period)
    kept: dict[int, list[Tensor]] = {n: [] for n in lengths}
    for done, (sample, found) in enumerate(zip(runs, copying(model, tokenizer, task, runs), strict=True), 1):
        if found is not None:
            kept[sample.length].append(found)
        if progress is not None:
            progress(done, len(runs))
    right = [x for found in kept.values() for x in found]
    if not right:
        raise InputError(
            f"{_called(identity)} answered none of {len(runs)} questions right, so no head can "
            "be seen copying: try shorter lengths, or a model that can answer from a text"
        )
    every = torch.stack(right)
    scores = {"retrieval": every.mean(0), "activation": (every > 0).float().mean(0), **repeated}
    source = {
        "scores": {name: _MEANING[name] for name in scores},
        "copying": {"lengths": list(lengths), "samples": samples, "kept": [len(kept[n]) for n in lengths]},
        "repetition": {"tokens": period, "copies": COPIES, "texts": TEXTS},
        "seed": seed,
        **_circumstances(model),
    }
    # five decimals are far below the noise of the measurement and keep the file small
    return HeadRoles(identity, {name: x.round(decimals=5) for name, x in scores.items()}, source, info.layers)


def _circumstances(model) -> dict[str, str]:
    from . import __version__

    return {
        "date": date.today().isoformat(),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "foveal": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


# ---------------------------------------------------------------------- drawing


def heat_map(roles: HeadRoles, name: str) -> HeatMap:
    """What rich prints as the layers x heads map of one score; raises InputError for a name that is not there."""
    roles[name]
    return HeatMap(roles, name)


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Scores in percent for the terminal, a layer a line, KV groups in brackets; wide models come in several parts."""

    roles: HeadRoles
    name: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        x, identity = self.roles[self.name], self.roles.identity
        groups = torch.arange(x.shape[1]).view(identity["kv_heads"], -1).tolist()
        cell = max(3, len(str(x.shape[1] - 1))) + 1
        fit = max(1, (options.max_width - 6) // (cell * len(groups[0]) + 2))
        yield Text.assemble((self.name, "bold"), f" of {identity['name']}, in percent")
        if self.name in _MEANING:
            yield Text(_MEANING[self.name], style="dim")
        for first in range(0, len(groups), fit):
            yield from self._part(x, groups[first : first + fit], cell)

    def _part(self, x: Tensor, groups: list[list[int]], cell: int) -> Iterator[Text]:
        numbers = "".join("".join(f"{head:>{cell}}" for head in group).join("  ") for group in groups)
        yield Text("layer " + numbers, style="dim", no_wrap=True)
        largest = max(float(x.max()), 1e-9)
        for layer in range(x.shape[0]):
            line = Text(f"{layer:>5} ", no_wrap=True)
            for group in groups:
                line.append("[", "dim")
                for head in group:
                    value = float(x[layer, head])
                    shown = f"{value * 100:.0f}" if layer in self.roles.measured else "-"
                    line.append(f"{shown:>{cell}}", _shade(value / largest))
                line.append("]", "dim")
            yield line


def _shade(share: float) -> Style:
    """From the terminal's own background (nothing) to bright amber (the largest score)."""
    if share < 0.005:
        return Style(dim=True)
    bright = min(share, 1.0) ** 0.5  # the many small scores stay apart
    red, green, blue = (round(low + (high - low) * bright) for low, high in ((30, 255), (34, 190), (60, 70)))
    return Style(color="black" if bright > 0.6 else "white", bgcolor=f"rgb({red},{green},{blue})")

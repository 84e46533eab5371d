"""Small networks that methods learn for one model: where their weights are kept, and that they fit the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import InputError
from ...hub import model_identity
from ...known import known_file, own_file

_FORMAT = "foveal learned 1"


class Learned(NamedTuple):
    """Weights by name in float32, and what must be known to use them; source: how they were learned."""

    kind: str
    identity: dict[str, Any]
    weights: dict[str, Tensor]
    settings: dict[str, Any]
    source: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, weights in float16; returns its path."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"identity": self.identity, "settings": self.settings, "source": self.source}
        metadata = {"format": _FORMAT, "kind": self.kind} | {name: json.dumps(x) for name, x in about.items()}
        save_file({name: x.detach().cpu().half().contiguous() for name, x in self.weights.items()}, path, metadata)
        return path

    @staticmethod
    def load(path: str | Path, kind: str) -> Learned:
        """Read what `save` wrote; raises InputError where there is no such file, or of another kind."""
        path = Path(path).expanduser()
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if (about.get("format"), about.get("kind")) != (_FORMAT, kind):
                    raise InputError(f"'{path}' holds no {kind} weights: give a file that its training wrote")
                weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"'{path}' cannot be read ({error}): give a file that training of {kind} wrote") from None
        rest = (json.loads(about[name]) for name in ("identity", "settings", "source"))
        identity, settings, source = rest
        return Learned(kind, identity, weights, settings, source)


def learned_for(model, kind: str, path: str | Path | None = None) -> Learned:
    """The `kind` weights of this model: those in `path`, else those that ship with Foveal, else the user's own.

    kind: "flux" or "dhsa", a folder of `foveal.data`. Raises InputError where `path` is of another model, or where there are none.
    """
    identity = model_identity(model)
    name = identity["name"] or identity["architecture"]
    if path is None:
        path = known_file(model, kind, ".safetensors", _made_for)
    if path is None:
        raise InputError(
            f"nothing is learned for {name} yet: train once with `python -m foveal.methods.select.{kind}_train --model {name}`"
        )
    found = Learned.load(path, kind)
    if found.identity["weights"] != identity["weights"]:
        raise InputError(f"'{path}' was learned for {found.identity['name']}, not for {name}: train again")
    return found


def _made_for(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["identity"])


def learned_path(model, kind: str) -> Path:
    """Where a user's own weights are kept."""
    return own_file(model, kind, ".safetensors")


def load_into(module: torch.nn.Module, weights: dict[str, Tensor], prefix: str = "") -> torch.nn.Module:
    """Fill a module with the weights of a prefix, for use without gradients."""
    module.load_state_dict({name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)})
    return module.eval().requires_grad_(False)

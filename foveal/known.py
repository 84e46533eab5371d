"""What is known of one model beyond its weights: files that ship with Foveal, and those of the user."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from .hub import cache_dir, model_identity


def known_file(model, kind: str, suffix: str, identity: Callable[[Path], dict[str, Any]]) -> Path | None:
    """The file that ships for this model, else the user's own, which may still be of another model; None where there is neither.

    kind: a folder of `foveal.data`.  suffix: ".json" or ".safetensors".  identity: of a file, the model it was made for.
    """
    weights = model_identity(model)["weights"]
    shipped = files("foveal.data").joinpath(kind)
    for file in sorted(shipped.iterdir(), key=str) if shipped.is_dir() else ():
        path = Path(str(file))
        if path.suffix == suffix and identity(path)["weights"] == weights:
            return path
    own = own_file(model, kind, suffix)
    return own if own.is_file() else None


def made_for(path: Path) -> dict[str, Any]:
    """The model that a JSON file of ours was made for."""
    return json.loads(path.read_text("utf-8"))["identity"]


def own_file(model, kind: str, suffix: str) -> Path:
    """Where the user's own file for this model is kept."""
    return cache_dir() / kind / f"{model_identity(model)['weights']}{suffix}"

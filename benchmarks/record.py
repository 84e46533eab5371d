"""What every committed result says of itself: command, date, hardware, versions."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def meta() -> dict[str, Any]:
    """The circumstances of this run; no paths."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    module = sys.modules["__main__"].__spec__
    name = module.name.removesuffix(".__main__") if module is not None else Path(sys.argv[0]).stem
    found = {
        "command": f"python -m {name}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "gpu": gpu,
        "cpu": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if gpu is not None:
        import triton

        found["versions"]["triton"] = triton.__version__
    return found


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its circumstances."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta()} | result, indent=1) + "\n", "utf-8")

"""`foveal lab`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..command import check_writable
from ..errors import InputError
from .shared import Device, app, console, progress_bar


@app.command()
def lab(
    name: Annotated[str | None, typer.Argument(help="Which experiment; none: list them.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting in place of its default, like --set steps=500.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write numbers and curves, as JSON.")] = None,
    device: Device = None,
) -> None:
    """Train a tiny model in seconds to minutes and hold what it does against lines drawn beforehand: sinks, in-context learning, ..."""
    import torch

    from ..lens.lab import get_lab, labs

    if name is None:
        for known, cls in labs().items():
            console.print(f"[bold]{known}[/]: {cls.about}", highlight=False, soft_wrap=True)
        return
    chosen = get_lab(name, **dict(_setting(x) for x in set_ or []))
    if out is not None:
        check_writable(out, "--out")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this machine has no CUDA device that torch can use; leave the option out")
    with progress_bar(name) as progress:
        report = chosen.run(device=device, tick=progress)
    console.print(report)
    if out is not None:
        console.print(f"wrote {report.save(out)}", highlight=False, markup=False, soft_wrap=True)


def _setting(text: str) -> tuple[str, object]:
    """ "steps=500" as ("steps", 500)."""
    from ast import literal_eval

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InputError(f"--set {text}: expected NAME=VALUE, like steps=500")
    try:
        return name.strip(), literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise InputError(f"--set {text}: expected a number after '=', like steps=500") from error

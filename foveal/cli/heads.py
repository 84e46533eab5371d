"""`foveal heads`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..command import check_writable
from ..errors import InputError
from .shared import Device, Dtype, Model, app, console, errors, load_model, progress_bar


@app.command()
def heads(
    model: Model = None,
    score: Annotated[str, typer.Option(help="Which score to draw: retrieval, induction or echo.")] = "retrieval",
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure anew even where a file exists.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the head roles here; default: the cache folder.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """What each head does: measure head roles once for a model, draw them, keep them for the methods that need them."""
    from ..heads import calibrate as measure
    from ..heads import heat_map, roles_for, roles_path

    if out is not None:
        check_writable(out, "--out")
    network, tokenizer = load_model(model, device, dtype)
    roles = None
    if not calibrate:
        try:
            roles = roles_for(network)
        except InputError:
            errors.print("no head roles for this model yet: measuring them", highlight=False)
    if roles is None:
        with progress_bar("measuring heads") as progress:
            roles = measure(network, tokenizer, progress=progress)
        out = out or roles_path(network)
    console.print(heat_map(roles, score))
    if out is not None:
        console.print(f"wrote {roles.save(out)}", highlight=False, markup=False, soft_wrap=True)

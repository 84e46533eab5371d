"""`foveal verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..command import check_writable
from ..errors import InputError
from ..method import check_count
from .shared import Device, Dtype, app, console, errors, progress_bar
from .workers import Ray, RayCommand, Workers, check_place, load_for


@app.command(cls=RayCommand)
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Methods whose claims to re-check.")] = None,
    every: Annotated[bool, typer.Option("--all", help="The claims of all methods.")] = False,
    model: Annotated[str | None, typer.Option(help="Hugging Face id or local folder.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short texts and few samples: a check that all works, not a measurement.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Repeat claims that are finished already.")] = False,
    seed: Annotated[int, typer.Option(help="Which texts and needles.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for NAME.json; what is finished there is not repeated.")] = Path(
        "claims"
    ),
    device: Device = None,
    dtype: Dtype = None,
    workers: Workers = None,
    ray: Ray = None,
) -> None:
    """Does a paper's claim hold on this model? Runs the experiments of its method and writes what they measured."""
    from ..verify.run import check_names
    from ..verify.run import verify as run
    from ..verify.table import QUICKLY, line, rich_table

    if every == bool(names):
        raise InputError("name the methods whose claims to re-check, or give --all; `foveal methods` lists them")
    chosen = check_names(None if every else names)
    check_writable(out / "claim.json", "--out")
    check_place(workers, ray, device)
    check_count("seed", seed)
    loaded = load_for(model, device, dtype, ray)
    with progress_bar("reading the plan") as progress:
        found = run(
            *loaded,
            chosen,
            out=out,
            quick=quick,
            again=again,
            seed=seed,
            workers=workers,
            ray=ray,
            progress=progress,
            done=lambda result: errors.print(line(result), highlight=False, markup=False),
        )
    console.print(rich_table(found.results))
    if quick:
        console.print(QUICKLY, highlight=False, markup=False)
    for name, message in found.failed.items():
        errors.print(f"[red]{escape(name)} broke:[/] {escape(message)}", highlight=False, soft_wrap=True)
    kept = len(found.results) - len(found.again)
    known = f"; {kept} finished before, --again repeats them" if kept else ""
    console.print(f"wrote {len(found.again)} to {out}{known}", highlight=False, markup=False, soft_wrap=True)
    if found.interrupted:
        errors.print("[yellow]Stopped before the end: what was finished is kept; the same command goes on.[/]")
        raise typer.Exit(130)
    if found.failed:
        raise typer.Exit(1)

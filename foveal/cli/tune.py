"""`foveal tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..command import check_writable
from ..errors import InputError
from .shared import (
    Device,
    Dtype,
    Model,
    alone_in,
    app,
    command_line,
    console,
    errors,
    progress_bar,
    split_values,
)
from .workers import Ray, RayCommand, Workers, check_place, load_for


@app.command(cls=RayCommand)
def tune(
    ctx: typer.Context,
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(help='Your prompts, JSON lines {"prompt": ..., "answer": ...}; answers on all lines or on none.'),
    ] = None,
    memory: Annotated[float, typer.Option(help="The most bytes, as a share of the dense cache's.")] = 0.25,
    max_drop: Annotated[float, typer.Option(help="The most that may be lost, as a share of dense's score.")] = 0.02,
    methods: Annotated[str | None, typer.Option(help="Methods to try; default: all that let keys go.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Generated tasks where there are no prompts, as for compare.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of generated texts.")] = 1024,
    samples: Annotated[
        int | None, typer.Option(help="Prompts, or questions per task; default: all prompts, or 24.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens answered, or compared with dense, after each prompt.")] = 64,
    plain: Annotated[
        bool, typer.Option("--plain", help="Give prompts as they are, without the chat template.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Which prompts come first, which texts.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for foveal.toml and the report; a stopped search goes on there.")
    ] = Path("foveal-tune"),
    device: Device = None,
    dtype: Dtype = None,
    workers: Workers = None,
    ray: Ray = None,
) -> None:
    """Which method and budget serve this model within a memory limit? Searches on your prompts and writes a profile."""
    from ..compare.plan import expanded
    from ..compare.report import write_report
    from ..spec import parse_task
    from ..tune.prompts import read_prompts
    from ..tune.search import candidates, check_drop
    from ..tune.search import tune as run

    names = split_values(methods, "methods") or None
    _, asked = expanded([], split_values(tasks, "tasks"))
    chosen = [parse_task(t) for t in asked] or None
    check_drop(max_drop)
    candidates(memory, names)
    if samples is not None and samples < 1:
        raise InputError(f"--samples {samples}: ask for at least one prompt or question")
    if data is not None and chosen is not None:
        raise InputError("give --data or --tasks, not both: prompts are the task")
    if tokens < 1:
        raise InputError(f"--tokens {tokens}: ask for at least one token")
    if data is not None:
        read_prompts(data, plain=plain, max_new_tokens=tokens)
    check_writable(out / "foveal.toml", "--out")
    check_place(workers, ray, device)
    ctx.with_resource(alone_in(out))
    loaded = load_for(model, device, dtype, ray)
    with progress_bar("reading the plan") as progress:
        found = run(
            *loaded,
            data,
            memory=memory,
            max_drop=max_drop,
            names=names,
            tasks=chosen,
            length=length,
            samples=samples,
            new_tokens=tokens,
            plain=plain,
            seed=seed,
            out=out,
            progress=progress,
            command=command_line(),
            workers=workers,
            ray=ray,
        )
    results = found.comparison.to_dict()
    found.comparison.save_json(out / "results.json")
    write_report(results, out / "report.html")
    console.print(found.sentence, highlight=False, markup=False)
    if found.interrupted:
        raise typer.Exit(130)
    files = (
        [out / "report.html"]
        if found.profile is None
        else [found.profile.save(out / "foveal.toml"), out / "report.html"]
    )
    if found.profile is None and (out / "foveal.toml").exists():
        errors.print(f"{out / 'foveal.toml'} is an earlier search's, with other limits", markup=False, soft_wrap=True)
    console.print(f"wrote {' and '.join(map(str, files))}", highlight=False, markup=False, soft_wrap=True)
    if found.profile is None:
        raise typer.Exit(1)

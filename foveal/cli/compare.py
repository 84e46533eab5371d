"""`foveal compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..command import check_writable
from ..errors import InputError
from .shared import (
    TASKS,
    Device,
    Dtype,
    Model,
    alone_in,
    app,
    budget_value,
    command_line,
    console,
    errors,
    progress_bar,
    split_values,
    whole,
)
from .workers import Ray, RayCommand, Workers, check_place, load_for


@app.command(cls=RayCommand)
def compare(
    ctx: typer.Context,
    model: Model = None,
    methods: Annotated[
        str | None, typer.Option(help='Comma-separated names, compositions like "quest|h2o(budget=0.5)", or "all".')
    ] = None,
    tasks: Annotated[str | None, typer.Option(help=f'{TASKS} "ruler" is the eleven of RULER.')] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Comma-separated shares of the tokens seen (0.25) or token counts (512).")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Comma-separated text lengths in tokens.")] = None,
    samples: Annotated[int | None, typer.Option(help="Questions per task and length.")] = None,
    seed: Annotated[int, typer.Option(help="Which texts and needles.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    workers: Workers = None,
    ray: Ray = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("foveal-results"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write results.json here instead.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the answers in --out; what was added since (methods, samples, ..) is asked too.",
        ),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One short length and two budgets: a check that all works, in a minute or two."),
    ] = False,
) -> None:
    """Which method, at which budget, costs what on this model: scores, resident bytes, memory and speed in one run."""
    from ..compare.plan import BUDGETS, LENGTHS, METHODS, SAMPLES, configurations, default_tasks, expanded
    from ..compare.report import headline, write_report
    from ..compare.run import compare as run
    from ..compare.table import rich_table
    from ..spec import parse_task

    defaults = (LENGTHS, BUDGETS) if not quick else ((512,), (0.5, 0.25))
    names, asked = expanded(split_values(methods, "methods"), split_values(tasks, "tasks"))
    chosen = {
        "methods": names or METHODS,
        "tasks": [parse_task(t) for t in asked] or default_tasks(),
        "budgets": [budget_value(b, "--budgets") for b in split_values(budgets, "budgets")] or defaults[1],
        "lengths": [whole(n, "lengths") for n in split_values(lengths, "lengths")] or defaults[0],
    }
    if samples is not None and samples < 1:
        raise InputError(f"--samples {samples}: ask for at least one question")
    configurations(chosen["methods"], chosen["budgets"])  # bad names and values are told before the model is loaded
    json_path, page = json_path or out / "results.json", out / "report.html"
    check_writable(page, "--out")
    check_writable(json_path, "--json" if json_path.parent != out else "--out")
    check_place(workers, ray, device)
    ctx.with_resource(alone_in(out))
    loaded = load_for(model, device, dtype, ray)
    with progress_bar("reading the plan") as progress:
        result = run(
            *loaded,
            **chosen,
            samples=samples or SAMPLES,
            seed=seed,
            command=command_line(),
            journal=out / "answers.jsonl",
            fresh=not resume,
            workers=workers,
            ray=ray,
            progress=progress,
        )
    results = result.to_dict()
    result.save_json(json_path)
    out.mkdir(parents=True, exist_ok=True)
    write_report(results, page)
    console.print(rich_table(results, console.width))
    console.print(headline(results), highlight=False, markup=False)
    if result.meta["interrupted"]:
        errors.print(
            "[yellow]Stopped before the end: the table and files hold what was measured until then; --resume goes on.[/]"
        )
    console.print(f"wrote {json_path} and {page}", highlight=False, markup=False, soft_wrap=True)
    if result.meta["interrupted"]:
        raise typer.Exit(130)

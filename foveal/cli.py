"""The command line: a thin layer over the functions of the package."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import FovealError, InputError

app = typer.Typer(
    help="See what attention does, spend less of it, correct it: every method as a small file, any two compared in one run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console, errors = Console(), Console(stderr=True)

Model = Annotated[
    str | None, typer.Argument(help="Hugging Face id or local folder; default: SmolLM2-135M-Instruct, fetched once.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda where there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 elsewhere.")
]


@app.command()
def compare(
    model: Model = None,
    methods: Annotated[
        str | None, typer.Option(help='Comma-separated names, or compositions like "quest|h2o(budget=0.5)".')
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated: passkey, needle, perplexity.")] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Comma-separated shares of the tokens seen (0.25) or token counts (512).")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Comma-separated text lengths in tokens.")] = None,
    samples: Annotated[int | None, typer.Option(help="Questions per task and length.")] = None,
    seed: Annotated[int, typer.Option(help="Which texts and needles.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("foveal-results"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write results.json here instead.")] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One short length and two budgets: a check that all works, in a minute or two."),
    ] = False,
) -> None:
    """Which method, at which budget, costs what on this model: scores, resident bytes, memory and speed in one run."""
    from .compare.report import headline, write_report
    from .compare.run import BUDGETS, LENGTHS, METHODS, SAMPLES, configurations, default_tasks
    from .compare.run import compare as run
    from .compare.table import rich_table
    from .tasks import get_task

    defaults = (LENGTHS, BUDGETS) if not quick else ((512,), (0.5, 0.25))
    chosen = {
        "methods": _split(methods, "methods") or METHODS,
        "tasks": [get_task(t) for t in _split(tasks, "tasks")] or default_tasks(),
        "budgets": [_budget(b) for b in _split(budgets, "budgets")] or defaults[1],
        "lengths": [_whole(n, "lengths") for n in _split(lengths, "lengths")] or defaults[0],
    }
    if samples is not None and samples < 1:
        raise InputError(f"--samples {samples}: ask at least one question")
    configurations(chosen["methods"], chosen["budgets"])  # bad names and values are told before the model is loaded
    json_path = json_path or out / "results.json"
    _check_writable(out)
    _check_writable(json_path.parent)
    loaded = _load(model, device, dtype)
    command = " ".join(["foveal", *(f'"{a}"' if " " in a or "|" in a or "(" in a else a for a in sys.argv[1:])])
    with _progress() as progress:
        bar = progress.add_task("reading the plan", total=1.0)
        result = run(
            *loaded,
            **chosen,
            samples=samples or SAMPLES,
            seed=seed,
            command=command,
            progress=lambda line, share: progress.update(bar, description=line, completed=share),
        )
    results = result.to_dict()
    result.save_json(json_path)
    write_report(results, out / "report.html")
    console.print(rich_table(results))
    console.print(headline(results), highlight=False)
    if result.meta["interrupted"]:
        errors.print("[yellow]Stopped before the end: the table and files hold what was measured until then.[/]")
    console.print(f"wrote {json_path} and {out / 'report.html'}", highlight=False, soft_wrap=True)
    if result.meta["interrupted"]:
        raise typer.Exit(130)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    model: Annotated[str | None, typer.Option(help="Hugging Face id or local folder.")] = None,
    method: Annotated[str, typer.Option(help='A name, or a composition like "quest|h2o(budget=0.5)".')] = "dense",
    budget: Annotated[str | None, typer.Option(help="Share of the tokens seen (0.25) or token count (512).")] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    plain: Annotated[
        bool, typer.Option("--plain", help="Give the prompt as it is, without the chat template.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Generate greedily with a method, and say what the cache came to."""
    from . import attach, get_method
    from .tasks.task import encode

    chosen = None
    if method != "dense":
        chosen = get_method(method) if budget is None else get_method(method, budget=_budget(budget))
    if tokens < 1:
        raise InputError(f"--tokens {tokens}: ask for at least one token")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InputError("the prompt is empty: give at least one word")
    network, tokenizer = _load(model, device, dtype)
    import torch
    from transformers import TextStreamer

    if tokenizer.chat_template and not plain:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = encode(tokenizer, text)
    else:
        ids = encode(tokenizer, text, special=True)
    with attach(network, chosen) as session:
        network.generate(
            torch.tensor([ids], device=network.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=network.device),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        store = session.store
    share = store.nbytes / max(1, store.dense_nbytes)
    errors.print(
        f"[dim]{int(store.seen[0]):,} tokens seen, cache {store.nbytes / 2**20:.1f} MiB, {share:.0%} of dense[/]",
        highlight=False,
    )


@app.command("methods")
def list_methods(
    as_json: Annotated[
        bool, typer.Option("--json", help="Machine-readable: name, questions, parameters, paper, claim.")
    ] = False,
) -> None:
    """All methods with the questions they answer, their parameters and their papers."""
    from .method import methods

    rows = []
    for name, cls in methods().items():
        default = cls()
        rows.append({
            "name": name,
            "questions": list(default.asks),
            "params": {k: _plain(v) for k, v in default.params.items()},
            "paper": cls.paper,
            "claim": cls.claim,
            "description": (cls.__doc__ or "").strip(),
        })  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "answers", "parameters", "paper"):
        table.add_column(column, overflow="fold")
    for r in rows:
        params = ", ".join(f"{k}={v}" for k, v in r["params"].items())
        table.add_row(r["name"], ", ".join(r["questions"]), params, r["paper"])
    console.print(table)


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
    from .heads import calibrate as measure
    from .heads import heat_map, roles_for, roles_path

    if out is not None:
        _check_writable(out.parent)
    network, tokenizer = _load(model, device, dtype)
    roles = None
    if not calibrate:
        try:
            roles = roles_for(network)
        except InputError:
            errors.print("no head roles for this model yet: measuring them", highlight=False)
    if roles is None:
        with _progress() as progress:
            bar = progress.add_task("measuring heads", total=1.0)
            roles = measure(
                network, tokenizer, progress=lambda line, share: progress.update(bar, description=line, completed=share)
            )
        out = out or roles_path(network)
    console.print(heat_map(roles, score))
    if out is not None:
        console.print(f"wrote {roles.save(out)}", highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------- shared


def _load(model: str | None, device: str | None, dtype: str | None):
    from .hub import load

    return load(model, device=device, dtype=dtype)


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=errors, transient=False)


def _split(text: str | None, name: str) -> list[str]:
    """Comma-separated values; commas inside brackets belong to the value."""
    if text is None:
        return []
    parts, depth = [""], 0
    for ch in text:
        depth += (ch == "(") - (ch == ")")
        if ch == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += ch
    parts = [p.strip() for p in parts if p.strip()]
    if not parts:
        raise InputError(f"--{name} is empty: give at least one value")
    return parts


def _budget(text: str) -> float | int:
    from .method import check_budget

    try:
        value = float(text) if any(c in text for c in ".eE%") else int(text)
    except ValueError:
        value = text
    check_budget(value, "--budgets")
    return value


def _whole(text: str, name: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--{name} {text}: expected whole numbers of tokens, like 1024,2048")
    return int(text)


def _check_writable(folder: Path) -> None:
    """Raise before any work when results could not be written; leaves nothing behind."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"cannot write to {folder}: {nearest} is not a writable folder; choose another with --out")


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def main() -> None:
    """Entry point: errors end in one sentence and exit code 2; --debug shows where they came from."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except KeyboardInterrupt:
        errors.print("stopped; nothing was written")
        sys.exit(130)
    except Exception as e:
        sentence = _sentence(e)
        if debug or sentence is None:
            raise
        errors.print(f"[red]error:[/] {sentence}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _sentence(e: Exception) -> str | None:
    if isinstance(e, FovealError):
        return str(e)
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or "not enough memory" in str(e):
        return "out of memory: use a shorter text, a smaller model or another --device"
    return None


if __name__ == "__main__":
    main()

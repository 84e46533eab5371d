"""The command line: a thin layer over the functions of the package."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import FovealError, InputError
from .tasks import tasks as known_tasks

if TYPE_CHECKING:
    from .method import Method

console, errors = Console(), Console(stderr=True)


class Commands(typer.core.TyperGroup):
    """Says that it was stopped, which Typer by itself would not."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            errors.print("stopped; nothing was written")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    help="See what attention does, spend less of it, correct it: every method as a small file, any two compared in one run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog="Errors end in one sentence and exit code 2; add --debug to any command to see where one came from.",
)

Model = Annotated[
    str | None, typer.Argument(help="Hugging Face id or local folder; default: SmolLM2-135M-Instruct, fetched once.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda where there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 elsewhere.")
]
TASKS = f"Comma-separated, options in brackets (\"longbench(subset='hotpotqa', data='folder')\"): {', '.join(known_tasks())}."


@app.command()
def compare(
    model: Model = None,
    methods: Annotated[
        str | None, typer.Option(help='Comma-separated names, or compositions like "quest|h2o(budget=0.5)".')
    ] = None,
    tasks: Annotated[str | None, typer.Option(help=TASKS)] = None,
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
    from .spec import parse_task

    defaults = (LENGTHS, BUDGETS) if not quick else ((512,), (0.5, 0.25))
    chosen = {
        "methods": _split(methods, "methods") or METHODS,
        "tasks": [parse_task(t) for t in _split(tasks, "tasks")] or default_tasks(),
        "budgets": [_budget(b, "--budgets") for b in _split(budgets, "budgets")] or defaults[1],
        "lengths": [_whole(n, "lengths") for n in _split(lengths, "lengths")] or defaults[0],
    }
    if samples is not None and samples < 1:
        raise InputError(f"--samples {samples}: ask for at least one question")
    configurations(chosen["methods"], chosen["budgets"])  # bad names and values are told before the model is loaded
    json_path, page = json_path or out / "results.json", out / "report.html"
    _check_writable(page, "--out")
    _check_writable(json_path, "--json" if json_path.parent != out else "--out")
    loaded = _load(model, device, dtype)
    with _progress() as progress:
        bar = progress.add_task("reading the plan", total=1.0)
        result = run(
            *loaded,
            **chosen,
            samples=samples or SAMPLES,
            seed=seed,
            command=_command(),
            progress=lambda line, share: progress.update(bar, description=line, completed=share),
        )
    results = result.to_dict()
    result.save_json(json_path)
    out.mkdir(parents=True, exist_ok=True)
    write_report(results, page)
    console.print(rich_table(results))
    console.print(headline(results), highlight=False, markup=False)
    if result.meta["interrupted"]:
        errors.print("[yellow]Stopped before the end: the table and files hold what was measured until then.[/]")
    console.print(f"wrote {json_path} and {page}", highlight=False, markup=False, soft_wrap=True)
    if result.meta["interrupted"]:
        raise typer.Exit(130)


@app.command()
def tune(
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
) -> None:
    """Which method and budget serve this model within a memory limit? Searches on your prompts and writes a profile."""
    from .compare.report import write_report
    from .spec import parse_task
    from .tune.prompts import read_prompts
    from .tune.search import candidates, check_drop
    from .tune.search import tune as run

    names = _split(methods, "methods") or None
    chosen = [parse_task(t) for t in _split(tasks, "tasks")] or None
    check_drop(max_drop)
    candidates(memory, names)
    if tokens < 1:
        raise InputError(f"--tokens {tokens}: ask for at least one token")
    if data is not None:
        read_prompts(data, plain=plain, max_new_tokens=tokens)
    _check_writable(out / "foveal.toml", "--out")
    loaded = _load(model, device, dtype)
    with _progress() as progress:
        bar = progress.add_task("reading the plan", total=1.0)
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
            progress=lambda line, share: progress.update(bar, description=line, completed=share),
            command=_command(),
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
    console.print(f"wrote {' and '.join(map(str, files))}", highlight=False, markup=False, soft_wrap=True)
    if found.profile is None:
        raise typer.Exit(1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    model: Annotated[str | None, typer.Option(help="Hugging Face id or local folder.")] = None,
    method: Annotated[
        str | None, typer.Option(help='A name, or a composition like "quest|h2o(budget=0.5)"; default: dense.')
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Share of the tokens seen (0.25) or token count (512).")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="A foveal.toml that `foveal tune` wrote: its method, and its model unless --model."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    plain: Annotated[
        bool, typer.Option("--plain", help="Give the prompt as it is, without the chat template.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Generate greedily with a method, and say what the cache came to."""
    from . import attach, get_method
    from .profile import load_profile
    from .tasks.task import encode

    if profile is not None and not method is budget is None:
        raise InputError("a profile says method and budget: give --profile, or --method and --budget")
    found = None if profile is None else load_profile(profile)
    params = {} if budget is None else {"budget": _budget(budget, "--budget")}
    if method in (None, "dense") and params:
        raise InputError("dense attention keeps everything and takes no --budget: name a method with --method")
    chosen = found.method if found else None if method in (None, "dense") else get_method(method, **params)
    if tokens < 1:
        raise InputError(f"--tokens {tokens}: ask for at least one token")
    text = sys.stdin.buffer.read().decode(errors="replace") if prompt == "-" else prompt
    if not text.strip():
        raise InputError("the prompt is empty: give at least one word")
    network, tokenizer = _load(found.model.get("name") if found and model is None else model, device, dtype)
    import torch
    from transformers import TextStreamer

    if tokenizer.chat_template and not plain:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = encode(tokenizer, text)
    else:
        ids = encode(tokenizer, text, special=True)
    _check_fits(network, chosen, len(ids), tokens)
    with found.attach(network) if found else attach(network, chosen) as session:
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
            "claim": str(cls.claim),
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
        table.add_row(*map(escape, (r["name"], ", ".join(r["questions"]), params, r["paper"])))
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
        _check_writable(out, "--out")
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
        console.print(f"wrote {roles.save(out)}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def look(
    model: Model = None,
    text: Annotated[Path | None, typer.Option(help="Text file to read; '-' reads standard input.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text itself, in place of --text.")] = None,
    lens: Annotated[
        str | None, typer.Option(help="Comma-separated names of lenses; default: all that suit the text.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Read at most so many tokens of the text.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write what was measured, with the numbers beside it.")] = Path(
        "lens.json"
    ),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """What does attention do on a text: sinks, distances, head roles and the residual stream behind them, in one pass."""
    from .lens import look as run
    from .lens.lens import choose
    from .tasks.task import encode

    if (text is None) == (prompt is None):
        raise InputError("name one text to look at: a file with --text FILE, or the text itself with --prompt")
    if length is not None and length < 1:
        raise InputError(f"--length {length}: ask for at least one token")
    chosen = _split(lens, "lens") or None
    choose(chosen)  # a bad name is told before the model is loaded
    _check_writable(out, "--out")
    words = _read(text) if prompt is None else prompt
    if not words.strip():
        raise InputError("the text is empty: give at least one word")
    network, tokenizer = _load(model, device, dtype)
    ids = encode(tokenizer, words, special=True)[:length]
    with _progress() as progress:
        bar = progress.add_task("reading", total=1.0)
        found = run(
            network,
            tokenizer,
            ids,
            chosen,
            progress=lambda line, share: progress.update(bar, description=line, completed=share),
        )
    console.print(found)
    written = found.save(out)
    console.print(
        f"wrote {written} and {written.with_suffix('.safetensors')}", highlight=False, markup=False, soft_wrap=True
    )


@app.command()
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
) -> None:
    """Does a paper's claim hold on this model? Runs the experiments of its method and writes what they measured."""
    from .verify.run import check_names
    from .verify.run import verify as run
    from .verify.table import line, rich_table

    if every == bool(names):
        raise InputError("name the methods whose claims to re-check, or give --all; `foveal methods` lists them")
    chosen = check_names(None if every else names)
    _check_writable(out / "claim.json", "--out")
    loaded = _load(model, device, dtype)
    with _progress() as progress:
        bar = progress.add_task("reading the plan", total=1.0)
        found = run(
            *loaded,
            chosen,
            out=out,
            quick=quick,
            again=again,
            seed=seed,
            progress=lambda text, share: progress.update(bar, description=text, completed=share),
            done=lambda result: errors.print(line(result), highlight=False, markup=False),
        )
    console.print(rich_table(found.results))
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


# ---------------------------------------------------------------------- shared


def _load(model: str | None, device: str | None, dtype: str | None):
    from .hub import load

    return load(model, device=device, dtype=dtype)


def _command() -> str:
    """The command line as it was given."""
    return " ".join(["foveal", *(f'"{a}"' if " " in a or "|" in a or "(" in a else a for a in sys.argv[1:])])


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
    from .spec import split

    parts = [p.strip() for p in split(text, ",") if p.strip()]
    if not parts:
        raise InputError(f"--{name} is empty: give at least one value")
    return parts


def _read(file: Path) -> str:
    if str(file) == "-":
        return sys.stdin.buffer.read().decode(errors="replace")
    return file.read_bytes().decode(errors="replace")


def _budget(text: str, option: str) -> float | int:
    from .method import check_budget

    try:
        value = float(text) if any(c in text for c in ".eE") else int(text)
    except ValueError:
        value = text
    check_budget(value, option)
    return value


def _whole(text: str, name: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--{name} {text}: expected whole numbers of tokens, like 1024,2048")
    return int(text)


def _check_writable(file: Path, option: str) -> None:
    """Raise before any work when `file` could not be written; leaves nothing behind."""
    if file.is_dir():
        raise InputError(f"cannot write {file}: it is a folder; name another place with {option}")
    nearest = file.absolute().parent
    try:
        while not nearest.exists():
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):  # permissions alone do not tell: the disk may be read-only or full
            pass
    except OSError as e:
        reason = (e.strerror or str(e)).lower()
        raise InputError(
            f"cannot write {file}: {nearest} takes no new files ({reason}); name another place with {option}"
        ) from e


def _check_fits(network, method: Method | None, prompt: int, more: int) -> None:
    """Raise where the prompt and what is to be generated pass the model's positions."""
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    beyond = method is not None and any(getattr(m, "unbounded", False) for m in method.parts)
    # The last token generated is never read.
    if limit is not None and not beyond and prompt + more - 1 > limit:
        raise InputError(
            f"the prompt has {prompt:,} tokens and --tokens asks for {more:,} more, but the model has {limit:,} positions: "
            "shorten the prompt or lower --tokens"
        )


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def main() -> None:
    """Entry point: errors end in one sentence and exit code 2; --debug shows where they came from."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except Exception as e:
        sentence = _sentence(e)
        if debug or sentence is None:
            raise
        errors.print(f"[red]error:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _sentence(e: Exception) -> str | None:
    from .compare.measure import out_of_memory

    if isinstance(e, FovealError):
        return str(e)
    if out_of_memory(e):
        return "out of memory: use a shorter text, a smaller model or another --device"
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename or 'a file'}: {e.strerror.lower()}; check the path, its permissions and the free space"
    return None


if __name__ == "__main__":
    main()

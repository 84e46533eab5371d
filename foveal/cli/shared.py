"""What the commands share: the app, its consoles, options and checks that come before any work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import InputError
from ..tasks import tasks as known_tasks

if TYPE_CHECKING:
    from ..method import Method

try:
    import fcntl
except ImportError:  # Windows has none: there two runs in one folder are not told apart
    fcntl = None

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
MethodName = Annotated[
    str | None, typer.Option(help='A name, or a composition like "quest|h2o(budget=0.5)"; default: dense.')
]
BudgetText = Annotated[str | None, typer.Option(help="Share of the tokens seen (0.25) or token count (512).")]
ProfileFile = Annotated[
    Path | None,
    typer.Option(help="A foveal.toml that `foveal tune` wrote: its method, and its model unless one is named."),
]
TASKS = f"Comma-separated, options in brackets (\"longbench(subset='hotpotqa', data='folder')\"): {', '.join(known_tasks())}."


def load_model(model: str | None, device: str | None, dtype: str | None):
    from ..hub import load

    return load(model, device=device, dtype=dtype)


def command_line() -> str:
    """The command line as it was given."""
    return " ".join(["foveal", *(f'"{a}"' if " " in a or "|" in a or "(" in a else a for a in sys.argv[1:])])


@contextmanager
def progress_bar(first: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error; what it gives is called with a line and the share done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=False) as progress:
        bar = progress.add_task(first, total=1.0)
        yield lambda line, share: progress.update(bar, description=line, completed=share)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder of answers, which they would write over; folders made for it go again if nothing came in.

    Raises InputError where another run works there.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if held is not None:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another run is writing to {folder}: wait for it, or name another --out") from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if held is not None:
            os.close(held)
        with suppress(OSError):
            for place in made:
                place.rmdir()


def split_values(text: str | None, name: str) -> list[str]:
    """Comma-separated values; commas inside brackets belong to the value."""
    if text is None:
        return []
    from ..spec import split

    parts = [p.strip() for p in split(text, ",") if p.strip()]
    if not parts:
        raise InputError(f"--{name} is empty: give at least one value")
    return parts


def read_text(file: Path) -> str:
    if str(file) == "-":
        return sys.stdin.buffer.read().decode(errors="replace")
    return file.read_bytes().decode(errors="replace")


def budget_value(text: str | None, option: str) -> float | int | None:
    from ..method import check_budget

    if text is None:
        return None
    try:
        value = float(text) if any(c in text for c in ".eE") else int(text)
    except ValueError:
        value = text
    check_budget(value, option)
    return value


def whole(text: str, name: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--{name} {text}: expected whole numbers of tokens, like 1024,2048")
    return int(text)


def check_fits(network, method: Method | None, prompt: int, more: int) -> None:
    """Raise where the prompt and what is to be generated pass the model's positions."""
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    beyond = method is not None and any(getattr(m, "unbounded", False) for m in method.parts)
    # The last token generated is never read.
    if limit is not None and not beyond and prompt + more - 1 > limit:
        raise InputError(
            f"the prompt has {prompt:,} tokens and --tokens asks for {more:,} more, but the model has {limit:,} positions: "
            "shorten the prompt or lower --tokens"
        )

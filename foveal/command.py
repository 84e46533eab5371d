"""The command line of what is trained or measured once for a model: `python -m foveal.methods.keep.duo_train --model ID`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import FovealError, InputError
from .hub import load


class Place(NamedTuple):
    """Which model, where it runs and which file is written; None for what the machine, or the cache folder, gives by itself."""

    model: str | None
    out: Path | None
    device: str | None
    dtype: str | None

    def load(self):
        """`(model, tokenizer)`."""
        return load(self.model, device=self.device, dtype=self.dtype)


class Command(argparse.ArgumentParser):
    """Options that all such commands have. module: whose, by its whole name. about: its docstring, of which the first line is shown."""

    def __init__(self, module: str, about: str):
        super().__init__(prog=f"python -m {module}", description=about.split("\n")[0])
        self.add_argument("--model", help="Hugging Face id or local folder; default: the default model")
        self.add_argument("--out", type=Path, help="file to write; default: the cache folder")
        self.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")
        self.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 elsewhere")

    def add_settings(self, usual: Any, *names: str) -> None:
        """An option for each of these numbers of `usual`, which holds their defaults."""
        for name in names:
            value = getattr(usual, name)
            self.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)

    def read(self, arguments: Sequence[str] | None = None) -> tuple[Place, argparse.Namespace]:
        """The place, and the other options. Raises InputError for a file that cannot be written, before any work."""
        chosen = self.parse_args(arguments)
        place = Place(*(vars(chosen).pop(name) for name in Place._fields))
        if place.out is not None:
            check_writable(place.out, "--out")
        return place, chosen


def check_writable(file: Path, option: str) -> None:
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


def run(main: Callable[[], None]) -> None:
    """Call `main`; what is wrong ends in one sentence and exit code 2."""
    try:
        main()
    except FovealError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

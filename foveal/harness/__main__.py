"""The command line of lm_eval with the model `foveal` and the tasks `foveal_*`; `tasks FOLDER` writes these as files."""

import sys
import tempfile

from ..errors import FovealError
from . import write_tasks

USAGE = "usage: python -m foveal.harness tasks FOLDER"


def main(arguments: list[str]) -> None:
    """Run lm_eval with these arguments. Raises InputError for what Foveal refuses, and exits as lm_eval does."""
    if arguments[:1] == ["tasks"]:
        if len(arguments) != 2 or arguments[1].startswith("-"):
            sys.exit(USAGE)
        print("wrote", len(write_tasks(arguments[1])), "tasks to", arguments[1])
        return
    from lm_eval.__main__ import cli_evaluate

    with tempfile.TemporaryDirectory() as folder:
        ours = "foveal" in _tasks(arguments) and not any(a.startswith("--include_path") for a in arguments)
        if ours:
            write_tasks(folder)
        sys.argv = ["lm_eval", *arguments, *(["--include_path", folder] if ours else [])]
        cli_evaluate()


def _tasks(arguments: list[str]) -> str:
    """What stands after --tasks (or -t), up to the next option."""
    said, inside = [], False
    for a in arguments:
        if a.startswith("-"):
            inside = a.partition("=")[0] in ("--tasks", "-t")
            a = a.partition("=")[2]
        if inside:
            said.append(a)
    return " ".join(said)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except FovealError as error:
        sys.exit(f"foveal: {error}")

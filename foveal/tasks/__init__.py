"""Evaluation tasks: `tasks()` lists them, `get_task(name)` makes one."""

from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from foveal.errors import InputError, suggest
from foveal.tasks.arithmetic import Arithmetic
from foveal.tasks.infinitebench import InfiniteBench
from foveal.tasks.key_perplexity import KeyPerplexity
from foveal.tasks.key_value import RetrieveKV, RetrieveNumber
from foveal.tasks.longbench import LongBench
from foveal.tasks.longbench_v2 import LongBenchV2
from foveal.tasks.mqar import mqar, mqar_accuracy
from foveal.tasks.multi_turn import MultiTurn
from foveal.tasks.needle import Needle
from foveal.tasks.niah import MultiNeedle, NeedleGrid
from foveal.tasks.passkey import Passkey
from foveal.tasks.perplexity import Perplexity
from foveal.tasks.ruler import NEEDLE_TASKS
from foveal.tasks.ruler_counts import CommonWords, FrequentWords, VariableTracking
from foveal.tasks.ruler_qa import HotpotQA, Squad
from foveal.tasks.scbench import SCBench
from foveal.tasks.task import DEPTHS, Sample, Task

__all__ = [
    "DEPTHS",
    "RULER_11",
    "RULER_13",
    "Needle",
    "Passkey",
    "Perplexity",
    "Sample",
    "Task",
    "get_task",
    "mqar",
    "mqar_accuracy",
    "tasks",
]

_RULER = (*NEEDLE_TASKS, VariableTracking, CommonWords, FrequentWords, Squad, HotpotQA)
_TASKS = {
    task.name: task
    for task in (
        *(Passkey, Needle, Perplexity, NeedleGrid, MultiNeedle, MultiTurn, RetrieveKV, RetrieveNumber, KeyPerplexity),
        *(Arithmetic, *_RULER, LongBench, LongBenchV2, InfiniteBench, SCBench),
    )
}
# The RULER-style suite without and with the two tasks that need a local data set; label tables with which it was.
RULER_11 = tuple(task.name for task in _RULER if not task.needs_data)
RULER_13 = tuple(task.name for task in _RULER)


def tasks() -> dict[str, type[Task]]:
    """Every task by its name; those with `needs_data` want a data set as `data`."""
    return dict(_TASKS)


def get_task(name: str, **options) -> Task:
    """The task called `name`, its fields set by `options`, for example `get_task("needle", per_context=1)`.

    Sets of a benchmark are named with a colon: `get_task("longbench:hotpotqa", data="folder")`. Raises `InputError`
    for an unknown name or option and suggests the nearest, and for an option of another type.
    """
    name, _, subset = name.partition(":")
    if name not in _TASKS:
        raise InputError(f"Expected a task, got '{name}'; {suggest(name, list(_TASKS))}")
    known = [field.name for field in fields(_TASKS[name])]
    if subset:
        options = {"subset": subset} | options
    for option in options:
        if option not in known:
            raise InputError(f"Task '{name}' has no option '{option}'; {suggest(option, known)}")
        _check_type(_TASKS[name], option, options[option])
    return _TASKS[name](**options)


_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def _check_type(task: type[Task], option: str, value: Any) -> None:
    """Raise for a value that is not of its option's type; what the option is by default always is."""
    kind = get_type_hints(task)[option]
    takes = {int: (int,), float: (int, float)}.get(kind, kind)
    default = next(field.default for field in fields(task) if field.name == option)
    if value is default is not MISSING or (isinstance(value, takes) and (kind is bool or not isinstance(value, bool))):
        return
    wants = _KINDS.get(kind, "a file or a folder as a text")
    raise InputError(f"Task '{task.name}' wants {wants} as '{option}', got {value!r:.60}; correct it.")

"""Evaluation tasks: `tasks()` lists them, `get_task(name)` makes one."""

from dataclasses import fields

from foveal.errors import InputError, suggest
from foveal.tasks.needle import Needle
from foveal.tasks.passkey import Passkey
from foveal.tasks.perplexity import Perplexity
from foveal.tasks.task import DEPTHS, Sample, Task

__all__ = ["DEPTHS", "Needle", "Passkey", "Perplexity", "Sample", "Task", "get_task", "tasks"]

_TASKS = {task.name: task for task in (Passkey, Needle, Perplexity)}


def tasks() -> dict[str, type[Task]]:
    """Every task by its name."""
    return dict(_TASKS)


def get_task(name: str, **options) -> Task:
    """The task called `name`, its fields set by `options`, for example `get_task("needle", per_context=1)`.

    Raises `InputError` for an unknown name or option and suggests the nearest.
    """
    if name not in _TASKS:
        raise InputError(f"Expected a task, got '{name}'; {suggest(name, list(_TASKS))}")
    known = [field.name for field in fields(_TASKS[name])]
    for option in options:
        if option not in known:
            raise InputError(f"Task '{name}' has no option '{option}'; {suggest(option, known)}")
    return _TASKS[name](**options)

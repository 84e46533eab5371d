"""Methods and tasks written as text: "h2o(budget=0.25)", "quest(budget=256) | h2o(budget=0.5)", "needle(per_context=1)"."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .method import Method, get_method

if TYPE_CHECKING:
    from .tasks import Task

METHOD = 'write it like "h2o(budget=0.25)" or "quest | h2o(budget=0.5)"'
TASK = 'write it like "passkey", "needle(per_context=1)" or "longbench(subset=\'hotpotqa\', data=\'folder\')"'


def parse(text: str) -> Method:
    """A method or a composition out of its text form; values are Python literals. Raises InputError with an example."""
    total: Method | None = None
    for piece in split(text, "|"):
        name, params = call(piece, text, "method", METHOD)
        part = get_method(name, **params)
        total = part if total is None else total | part
    return total


def parse_task(text: str) -> Task:
    """A task out of its text form, as `parse`: a name, its options in brackets. Raises InputError with an example."""
    from .tasks import get_task

    name, options = call(text, text, "task", TASK)
    return get_task(name, **options)


def call(piece: str, whole: str, what: str, example: str) -> tuple[str, dict[str, Any]]:
    """The name and the keyword values of "name(key=literal, ...)"; raises InputError with `example`."""
    name, bracket, rest = piece.strip().partition("(")
    if not name.strip() or (bracket and not rest.endswith(")")):
        raise InputError(f"cannot read the {what} '{whole}': {example}")
    if not bracket:
        return name.strip(), {}
    try:
        found = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(found, ast.Call) or found.args or any(k.arg is None for k in found.keywords):
            raise ValueError
        return name.strip(), {k.arg: ast.literal_eval(k.value) for k in found.keywords}
    except (SyntaxError, ValueError):
        raise InputError(f"cannot read the parameters of '{piece.strip()}': {example}") from None


def split(text: str, mark: str) -> list[str]:
    """The pieces of a text between marks; marks inside brackets or quotes belong to their piece."""
    pieces, depth, quote = [""], 0, ""
    for ch in text:
        if quote:
            quote = "" if ch == quote else quote
        elif ch in "'\"" and depth:  # outside of brackets nothing is quoted
            quote = ch
        else:
            depth += (ch in "([{") - (ch in ")]}")
        if ch == mark and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += ch
    return pieces


def written(method: Method | None) -> str:
    """The text form of a method, with the parameters that differ from their defaults; "dense" for none."""
    if method is None:
        return "dense"
    pieces = []
    for part in method.parts:
        fields = part.__dataclass_fields__
        changed = [f"{k}={v!r}" for k, v in part.params.items() if v != fields[k].default]
        pieces.append(part.name + (f"({', '.join(changed)})" if changed else ""))
    return " | ".join(pieces)

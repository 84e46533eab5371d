"""Methods written as text: "h2o(budget=0.25)", "quest(budget=256) | h2o(budget=0.5)"."""

import ast
from typing import Any

from .errors import InputError
from .method import Method, get_method

EXAMPLE = 'write it like "h2o(budget=0.25)" or "quest | h2o(budget=0.5)"'


def parse(text: str) -> Method:
    """A method or a composition out of its text form; values are Python literals. Raises InputError with an example."""
    total: Method | None = None
    for piece in text.split("|"):
        part = _single(piece.strip(), text)
        total = part if total is None else total | part
    return total


def _single(piece: str, text: str) -> Method:
    name, bracket, rest = piece.partition("(")
    if not name.strip() or (bracket and not rest.endswith(")")):
        raise InputError(f"cannot read the method '{text}': {EXAMPLE}")
    params: dict[str, Any] = {}
    if bracket:
        try:
            call = ast.parse(f"f({rest}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
                raise ValueError
            params = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError):
            raise InputError(f"cannot read the parameters of '{piece}': {EXAMPLE}") from None
    return get_method(name.strip(), **params)


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

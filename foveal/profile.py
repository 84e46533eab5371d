"""Profiles: which method at which budget serves a model, with the evidence for it, as a `foveal.toml` file."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .attach import Session, attach
from .errors import InputError
from .hub import model_identity
from .method import Budget, Method, get_method
from .spec import parse, written
from .store import Layout

FORMAT = "foveal profile 1"
_HEAD = "# Which attention method serves this model. `foveal generate --profile FILE` and foveal.profile.load_profile read it.\n"


@dataclass(frozen=True)
class Profile:
    """A method for one model. model: its identity (`foveal.hub.model_identity`). evidence: what was measured, free of form."""

    method: Method
    model: dict[str, Any]
    layout: Layout = field(default_factory=Layout)
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def budget(self) -> Budget | None:
        """The method's budget, where it is one method that has one."""
        return self.method.params.get("budget")

    def check(self, model) -> None:
        """Raise InputError for another model than the one this was made for."""
        here = model_identity(model)
        differs = [key for key, value in self.model.items() if key != "name" and here.get(key) != value]
        if differs:
            raise InputError(
                f"this profile was made for {self.model.get('name') or 'another model'}, but the model is {here['name']} "
                f"({', '.join(differs)} differ): run `foveal tune {here['name']}`"
            )

    def attach(self, model) -> Session:
        """Put the method on the model: `with profile.attach(model) as session:`. Raises InputError for another model."""
        self.check(model)
        return attach(model, self.method, layout=self.layout)

    def save(self, path: str | Path) -> Path:
        """Write the file and the folders above it; `load_profile` reads the same profile from it."""
        path, text = Path(path), written(self.method)
        if parse(text) != self.method:
            raise InputError(f"'{text}' cannot be written as text and read back, so no profile can hold it")
        top = {"format": FORMAT, "method": text, "budget": self.budget}
        tables = {"layout": self.layout._asdict(), "model": self.model, "evidence": self.evidence}
        parts = [_HEAD, _lines(top), *(f"\n[{name}]\n{_lines(table)}" for name, table in tables.items())]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(parts), encoding="utf-8")
        part.replace(path)
        return path


def load_profile(path: str | Path) -> Profile:
    """Read a `foveal.toml`. Raises InputError that names the file and what is wrong in it."""
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the profile {path}: {(error.strerror or str(error)).lower()}; check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the profile {path} is not TOML ({error}): let `foveal tune` write it anew") from None
    if found.get("format") != FORMAT:
        raise InputError(
            f'expected format = "{FORMAT}" in {path}, got {found.get("format")!r}: let `foveal tune` write it anew'
        )
    for name, kind in (("method", str), ("model", dict)):
        if not isinstance(found.get(name), kind):
            what = 'a text like "h2o(budget=0.25)"' if kind is str else "a table with the model's identity"
            raise InputError(f"expected '{name}' in {path} to be {what}, got {found.get(name)!r:.60}: correct it")
    layout, method = found.get("layout", {}), parse(found["method"])
    if not isinstance(layout, dict) or not set(layout) <= set(Layout._fields):
        raise InputError(
            f"expected [layout] in {path} to hold only {', '.join(Layout._fields)}, got {layout!r:.80}: correct it"
        )
    budget = method.params.get("budget")
    if "budget" in found and found["budget"] != budget:
        raise InputError(
            f"{path} says budget = {found['budget']!r}, but its method '{found['method']}' has {budget!r}: make them agree"
        )
    return Profile(method, found["model"], Layout(**layout), found.get("evidence", {}))


def chosen(
    method: str | None, budget: Budget | None, profile: str | Path | None
) -> tuple[Profile | None, Method | None]:
    """The profile, if one is named, and the method that it or the other two come to. Raises InputError where both are given."""
    if profile is None:
        return None, single(method, budget)
    if not method is budget is None:
        raise InputError("a profile says method and budget: give --profile, or --method and --budget")
    found = load_profile(profile)
    return found, found.method


def single(method: str | Method | None, budget: Budget | None = None) -> Method | None:
    """As `get_method`; None and "dense" are no method at all."""
    if isinstance(method, Method):
        return method if budget is None else with_budget(method, budget)
    if method not in (None, "dense"):
        return get_method(method, **({} if budget is None else {"budget": budget}))
    if budget is not None:
        raise InputError("dense attention keeps everything and takes no budget: name a method that lets keys go")
    return None


def with_budget(method: Method, budget: Budget) -> Method:
    if "budget" not in method.params:
        raise InputError(f"'{written(method)}' takes no budget: name a method that has one, or leave the budget out")
    return replace(method, budget=budget)


def _lines(values: dict[str, Any]) -> str:
    """Keys and values of a TOML table; what is None is left out, for TOML has no such value."""
    return "".join(f"{key} = {_value(value)}\n" for key, value in values.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(str(value), ensure_ascii=True).replace("\x7f", "\\u007f")

"""What a method is: a frozen dataclass that answers some of the four questions. Composition and the registry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from .edits import Bias, Keep, Plane, Reweigh
from .errors import CompositionError, InputError, suggest
from .selection import All, Selection

if TYPE_CHECKING:
    from .model_info import ModelInfo
    from .prompt import Prompt
    from .step import Pass, Step
    from .verify import Claim

QUESTIONS = ("read", "select", "weigh", "reweigh", "attend", "mix", "keep", "after", "begin", "end")
STATISTICS = ("col_mass", "col_low", "entropy", "sink_mass", "lse", "row_argmax")


class Out(NamedTuple):
    """What `attend` returns: out [batch, heads, length, head_dim] and the log-sum-exp [batch, heads, length], if it has one."""

    out: Tensor
    lse: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """Base of all methods; override the questions it answers, leave the rest.

    Fields are hyper-parameters with the paper's defaults. Instances never change: what a key carries is a plane, what lives
    for one forward pass is `step.state`, what `setup` derives from the model comes back as `step.plan`.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    claim: ClassVar[Claim]
    planes: ClassVar[Mapping[str, Plane]] = {}
    """Per-key state it wants the store to carry. (A property, like `needs`, where it depends on the fields.)"""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics to compute, as `step.stats[name]`: see STATISTICS; "col_low:400" looks at the last 400 queries of a prompt only.
    "whole_prompt" refuses a prompt in chunks."""
    columns: ClassVar[bool] = False
    """True: of statistics per key it reads only sums over the query heads of a KV head, `step.column(name)`, which cost less in decode."""
    dense_prefill: ClassVar[bool] = False
    """True: while the prompt is read, outputs are those of the dense model, so one dense prefill can serve many methods."""

    format: ClassVar[str | None] = None
    """In which codes ("int4", see `foveal.ops.formats`) it wants keys and values stored where the session's layout names none."""
    renumber: ClassVar[bool] = False
    """True: it numbers positions inside the cache; at most one in a composition does."""
    unbounded: ClassVar[bool] = False
    """True: texts may outgrow the model's positions."""
    neutral: ClassVar[Mapping[str, Any]] = {"budget": 1.0}
    """Parameters under which it changes nothing: what the generated checks compare with the dense model."""
    example: ClassVar[Mapping[str, Any]] = {"budget": 0.5}
    """Parameters under which it does something on any model: what the generated checks run."""

    def setup(self, model: ModelInfo) -> Any:
        """Once for each attached model: check that its needs are met, return what the hooks want to find in `step.plan`."""

    def where(self, model: ModelInfo) -> Iterable[int]:
        """The layers it acts on; others see the defaults and pay nothing."""
        return model.layers

    def read(self, prompt: Prompt) -> Tensor | None:
        """Before the model runs: which tokens of a new prompt it reads at all, bool [length]; None for all."""

    def begin(self, pass_: Pass) -> Hashable:
        """Before layer 0 of a forward pass, on the host: schedules."""

    def select(self, step: Step) -> Selection:
        """Which keys may each query see?"""
        return All()

    def weigh(self, step: Step) -> Bias | None:
        """What is added to the logits?"""

    def attend(self, step: Step, selection: Selection, bias: Bias | None) -> Out | None:
        """Replaces softmax attention, for mechanisms that are not a softmax over a subset."""

    def reweigh(self, step: Step) -> Reweigh | None:
        """Which attention weights change after the softmax?"""

    def mix(self, step: Step, out: Tensor) -> Tensor:
        """What happens to the head outputs [batch, heads, length, head_dim]? Out of place."""
        return out

    def after(self, step: Step) -> None:
        """Look after attention, change nothing."""

    def keep(self, step: Step) -> Keep | None:
        """What stays in memory?"""

    def end(self, pass_: Pass) -> None:
        """After the last layer, with all stores: `pass_.store.rows[i].apply(...)`."""

    # ------------------------------------------------------------------ composition

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self,)

    def __or__(self, other: Method) -> Chain:
        return Chain((*self.parts, *other.parts))

    @property
    def asks(self) -> tuple[str, ...]:
        """The questions it answers, derived from the hooks it overrides."""
        return tuple(q for q in QUESTIONS if getattr(type(self), q) is not getattr(Method, q))

    @property
    def params(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class Chain(Method):
    """Methods applied together: selections narrow left to right, biases add, edits chain. Checked when written."""

    members: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        names = [m.name for m in self.members]
        if sum("attend" in m.asks for m in self.members) > 1:
            raise CompositionError(f"two methods replace the attention itself in {' | '.join(names)}: keep one of them")
        if sum(m.renumber for m in self.members) > 1:
            raise CompositionError(f"two methods renumber positions in {' | '.join(names)}: keep one of them")
        if any("attend" in m.asks for m in self.members) and any(
            {"weigh", "reweigh"} & set(m.asks) for m in self.members
        ):
            raise CompositionError(f"a method in {' | '.join(names)} replaces the softmax, so no other can weigh it")
        keepers = [m for m in self.members if "keep" in m.asks]
        if any(need.startswith("col_") for m in keepers[1:] for need in m.needs):
            raise CompositionError(
                f"{' | '.join(m.name for m in keepers)}: statistics per key do not survive the first keep, so the method that needs "
                "them must come first and alone"
            )
        if len(formats := {m.format for m in self.members} - {None}) > 1:
            raise CompositionError(
                f"methods of {' | '.join(names)} store keys as {' and as '.join(sorted(formats))}: choose one"
            )
        self._check_windows(names)
        seen: dict[str, Plane] = {}
        for m in self.members:
            for plane, spec in m.planes.items():
                if plane in seen and plane != "mass":
                    raise CompositionError(f"two methods of {' | '.join(names)} keep a plane called '{plane}'")
                seen[plane] = spec

    def _check_windows(self, names: list[str]) -> None:
        windows: dict[str, str] = {}
        for need in sorted(frozenset().union(*(m.needs for m in self.members))):
            statistic = need.partition(":")[0]
            if statistic in windows:
                raise CompositionError(
                    f"methods of {' | '.join(names)} ask for '{windows[statistic]}' and '{need}': one step has one of them, "
                    "so give both the same window"
                )
            windows[statistic] = need

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.members

    @property
    def asks(self) -> tuple[str, ...]:
        return tuple(q for q in QUESTIONS if any(q in m.asks for m in self.members))

    @property
    def params(self) -> dict[str, Any]:
        return {m.name: m.params for m in self.members}


# ---------------------------------------------------------------------- budgets

Budget = float | int


def check_budget(value: Budget, name: str = "budget") -> None:
    """A budget is a share of the tokens seen (0 < share <= 1, a float) or a number of tokens (an int)."""
    good = not isinstance(value, bool) and (
        (isinstance(value, int) and value >= 1) or (isinstance(value, float) and 0 < value <= 1)
    )
    if not good:
        raise InputError(
            f"{name} = {value!r}: expected a share of the tokens seen (a float above 0 and up to 1.0) or a number of tokens (an int from 1)"
        )


def tokens_of(budget: Budget, seen: int) -> int:
    """How many tokens a budget means after `seen` tokens."""
    return budget if isinstance(budget, int) else max(1, math.ceil(budget * seen - 1e-9))


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise unless low <= value <= high."""
    if not (isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high):
        span = f"from {low} to {high}" if high != math.inf else f"of at least {low}"
        raise InputError(f"{name} = {value!r}: expected a number {span}")


def check_count(name: str, value: int, low: int = 0) -> None:
    """Raise unless value is a whole number of at least low."""
    if type(value) is not int or value < low:
        raise InputError(f"{name} = {value!r}: expected a whole number of at least {low}")


# ---------------------------------------------------------------------- registry

_REGISTRY: dict[str, type[Method]] = {}


def method(name: str, *, paper: str, claim: Claim | None = None) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: defining a method registers it under the paper's usual short name.

    claim: what the paper claims, as a `foveal.verify.Claim` with the experiments that test it or the reason why there are none.
    Raises InputError without a claim, for one in words alone, and where the name is taken.
    """
    from .verify import Claim

    if not isinstance(claim, Claim):
        raise InputError(
            f"method '{name}' has no claim that can be re-checked (got {claim!r:.60}): state it as claim=foveal.verify.Claim(words, "
            "experiments=...), or with untestable='why there is no experiment'"
        )

    def register(cls: type[Method]) -> type[Method]:
        if name in _REGISTRY:
            raise InputError(f"a method called '{name}' exists already: {_REGISTRY[name].__module__}")
        cls.name, cls.paper, cls.claim = name, paper, claim
        _REGISTRY[name] = cls
        return cls

    return register


def methods() -> dict[str, type[Method]]:
    """All registered methods by name."""
    from .methods import load_all  # defines and so registers them

    load_all()
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str, **params: Any) -> Method:
    """A method by name: get_method("h2o", budget=0.25), or a composition "quest | h2o(budget=0.25)"."""
    if "|" in name or "(" in name:
        from .spec import parse

        if params:
            raise InputError(f"give parameters inside the brackets of '{name}' or as keywords, not both")
        return parse(name)
    known = methods()
    if name not in known:
        raise InputError(f"no method called '{name}': {suggest(name, known)}")
    cls = known[name]
    fields = [f.name for f in dataclasses.fields(cls)]
    for p in params:
        if p not in fields:
            hint = suggest(p, fields) if fields else "it takes none"
            raise InputError(f"method '{name}' has no parameter '{p}': {hint}")
    return cls(**params)


def iterate(method: Method | None) -> Iterator[Method]:
    """The single methods of a method, a chain or nothing."""
    yield from (method.parts if method is not None else ())

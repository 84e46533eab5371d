"""What an experiment with a tiny model is: settings as fields, lines drawn beforehand, a report with numbers and curves."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from rich.markup import escape
from rich.table import Table

from ...errors import InputError, suggest
from ...method import check_count

Tick = Callable[[str, float], None]
Curves = dict[str, list[float]]
FOUND, LAW = "the paper's finding, line chosen here", "theorem"
"""Where a line comes from, when it was not simply chosen here."""


@dataclass(frozen=True)
class Finding:
    """One number against its line: `measured` must be "at least" or "at most" `line`. `basis`: where the line comes from."""

    says: str
    measured: float
    condition: Literal["at least", "at most"]
    line: float
    basis: str

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.measured >= self.line if self.condition == "at least" else self.measured <= self.line


def at_least(says: str, measured: float, line: float, basis: str = "chosen here") -> Finding:
    """A number that must reach its line."""
    return Finding(says, measured, "at least", line, basis)


def at_most(says: str, measured: float, line: float, basis: str = "chosen here") -> Finding:
    """A number that must stay under its line."""
    return Finding(says, measured, "at most", line, basis)


@dataclass(frozen=True)
class Report:
    """What a lab found.

    curves: what was followed in training, by name, lists of equal length within an arm; "ARM.step" gives the steps.
    settings: the lab's fields.  source: device, torch, date, seconds.
    """

    name: str
    paper: str
    findings: tuple[Finding, ...]
    curves: Curves = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """True when every finding holds."""
        return all(f.holds for f in self.findings)

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        findings = [dataclasses.asdict(f) | {"holds": f.holds} for f in self.findings]
        body = {"lab": self.name, "paper": self.paper, "holds": self.holds, "findings": findings}
        body |= {"settings": dict(self.settings), "source": dict(self.source), "curves": self.curves}
        path.write_text(json.dumps(body, indent=1, allow_nan=True) + "\n", encoding="utf-8")
        return path

    def __rich__(self) -> Table:
        """A line for each finding."""
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", caption_justify="left")
        table.title = escape(f"{self.name}: {self.paper}")
        table.caption = f"{self.source.get('seconds', 0):.0f} s on {self.source.get('device', '?')}"
        for name, justify in (("what was tested", "left"), ("measured", "right"), ("line", "left"), ("", "left")):
            table.add_column(name, justify=justify, overflow="fold")
        for f in self.findings:
            verdict = "[green]holds[/]" if f.holds else "[red]does not hold[/]"
            table.add_row(escape(f.says), f"{f.measured:.3g}", f"{f.condition} {f.line:.3g}", verdict)
        return table


@dataclass(frozen=True)
class Lab:
    """Base of all labs: settings as fields. `steps` is the length of one training run."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    about: ClassVar[str] = ""

    steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 2)
        check_count("seed", self.seed)

    def run(self, *, device: str | torch.device = "cpu", tick: Tick | None = None) -> Report:
        """Train and measure. tick: called with a line and the share of the work done.

        Randomness comes from `seed` alone; the caller's random state is left as it was.
        """
        device = torch.device(device)
        cards = [device] if device.type == "cuda" else []
        begun = time.monotonic()
        with torch.random.fork_rng(cards), torch.enable_grad():
            torch.manual_seed(self.seed)
            findings, curves = self.experiment(device, tick or (lambda line, share: None))
        source = {"device": _called(device), "torch": torch.__version__, "date": date.today().isoformat()}
        source["seconds"] = round(time.monotonic() - begun, 1)
        return Report(self.name, self.paper, tuple(findings), curves, dataclasses.asdict(self), source)

    def experiment(self, device: torch.device, tick: Tick) -> tuple[Sequence[Finding], Curves]:
        """Findings and curves; the random generators are seeded."""
        raise NotImplementedError


_LABS: dict[str, type[Lab]] = {}


def lab(name: str, *, paper: str, about: str) -> Callable[[type[Lab]], type[Lab]]:
    """Class decorator: defining a lab registers it."""

    def register(cls: type[Lab]) -> type[Lab]:
        cls.name, cls.paper, cls.about = name, paper, about
        _LABS[name] = cls
        return cls

    return register


def labs() -> dict[str, type[Lab]]:
    """All labs by name."""
    return dict(_LABS)


def get_lab(name: str, **settings: Any) -> Lab:
    """A lab by name, with settings in place of its defaults. Raises InputError for unknown names and settings."""
    if name not in _LABS:
        raise InputError(f"no lab called '{name}': {suggest(name, _LABS)}")
    known = [f.name for f in dataclasses.fields(_LABS[name])]
    for s in settings:
        if s not in known:
            raise InputError(f"lab '{name}' has no setting '{s}': {suggest(s, known)}")
    return _LABS[name](**settings)


def arm(tick: Tick, number: int, of: int) -> Tick:
    """The tick of one of several runs of equal length."""
    return lambda line, share: tick(line, (number + share) / of)


def logged(step: int, steps: int, points: int = 40) -> bool:
    """Whether to measure after this step: about `points` times, evenly, the first and the last included."""
    return step in (0, steps) or step % max(1, steps // points) == 0


def descend(
    title: str,
    steps: int,
    by: torch.optim.Optimizer,
    decay: torch.optim.lr_scheduler.LRScheduler,
    loss_of: Callable[[], torch.Tensor],
    tick: Tick,
    names: Sequence[str] = (),
    measure: Callable[[], Sequence[float]] = tuple,
) -> Curves:
    """Train for `steps` steps: curves `title`.step, .loss and one for each of `names`, which `measure` gives where something is logged.

    loss_of: the loss of the next sample, before each step and once more after the last.
    """
    curves: Curves = {f"{title}.{k}": [] for k in ("step", "loss", *names)}
    for step in range(steps + 1):
        loss = loss_of()
        if logged(step, steps):
            for kept, number in zip(curves.values(), (step, loss.item(), *measure()), strict=True):
                kept.append(number)
        if step == steps:
            break
        by.zero_grad(set_to_none=True)
        loss.backward()
        by.step()
        decay.step()
        tick(title, (step + 1) / steps)
    return curves


def _called(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

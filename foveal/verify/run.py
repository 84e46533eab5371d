"""Run claims and write down what came out: one JSON file a claim, finished ones are not repeated."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..attach import attach
from ..compare.measure import hardware, out_of_memory
from ..default_model import DEFAULT_MODEL
from ..errors import InputError, UnsupportedModel, suggest
from ..hub import check_weights, model_identity
from ..method import check_count, methods
from ..scale import Crew, Lost, Make, check_workers, crew
from ..tasks import get_task
from .claim import Claim
from .experiments import FAILS, HOLDS, VOID, Experiment, Finding
from .lab import QUICK, Lab, named

UNTESTABLE = "not testable here"
_META = {
    "model",
    "model_identity",
    "dtype",
    "hardware",
    "seed",
    "seconds",
    "asked",
    "date",
}  # what is read again, here and for tables


@dataclass
class Result:
    """One claim, re-checked. `plan` are the experiments as they were; `findings` what each measured."""

    name: str
    paper: str
    words: str
    number: str
    setting: str
    verdict: str
    why: str
    findings: list[dict[str, Any]]
    plan: list[str]
    quick: bool
    meta: dict[str, Any]


@dataclass
class Verification:
    """What one run found: results in the order of work, those that were finished before included; what broke, by name."""

    results: list[Result] = field(default_factory=list)
    again: list[str] = field(default_factory=list)  # names that were really run this time
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def claims() -> dict[str, Claim]:
    """The claims of all registered methods, by name."""
    return {name: cls.claim for name, cls in methods().items()}


def check_names(names: Sequence[str] | None) -> list[str]:
    """The methods asked for, each once; None is all. Raises InputError for an unknown one, and where a claim names a method, a
    parameter or a task that does not exist."""
    known = claims()
    chosen = list(dict.fromkeys(known if names is None else names))
    for name in chosen:
        if name not in known:
            raise InputError(f"no method called '{name}': {suggest(name, known)}")
        for arm, cell in (pair for e in known[name].experiments for pair in e.arms()):
            named(arm)
            if cell is not None:
                get_task(cell.task)
    return chosen


def verify(
    model,
    tokenizer,
    names: Sequence[str] | None = None,
    *,
    out: str | Path | None = None,
    quick: bool = False,
    again: bool = False,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
    done: Callable[[Result], None] | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> Verification:
    """Re-check the claims of methods on a model.

    names: default all methods.  out: folder for NAME.json (NAME.quick.json in a quick run), each written as soon as it is done; a
    claim that has a file for the same experiments, seed and model is read from there unless `again`.  quick: short texts and few
    samples, a check that all works.  progress: called with a line and the share done; done: with each new result.  workers, ray: where
    the claims are run, see `foveal.scale.crew`.
    Ctrl-C returns what was finished. A claim that needs what the model lacks is "not testable here"; one that breaks otherwise is
    in `failed` and has no file. Raises InputError before any work for unknown names, bad claims, a bad seed, weights that are not
    finite, a folder that holds results of another model and a cluster that cannot be reached.
    """
    chosen = check_names(names)
    check_count("seed", seed)
    check_workers(workers)
    check_weights(model)
    attach(model).close()  # a model that cannot be attached is refused before any work
    known = claims()
    run = _Verify(model, {n: known[n] for n in chosen}, out, quick, again, seed, progress, done)
    with crew(run.prover(), model, tokenizer, workers=workers, ray=ray) as hands:
        return run(hands)


@dataclass
class Proof:
    """What a worker found about one claim: findings with the verdict, or what broke; where and in how long."""

    findings: list[dict[str, Any]]
    verdict: str
    why: str
    broke: str
    seconds: float
    machine: dict[str, Any]


class Prover:
    """Runs claims on one model; a worker of `foveal.scale`."""

    def __init__(self, planned: Sequence[Experiment], seed: int, quick: bool, model, tokenizer):
        self.lab = Lab(model, tokenizer, planned, seed=seed, quick=quick)
        self.machine = {"device": model.device.type, "hardware": hardware(model.device)}

    def __call__(self, claim: Claim) -> Proof:
        start, findings, verdict, why, broke = time.perf_counter(), [], UNTESTABLE, claim.untestable, ""
        try:
            findings = [f for e in claim.experiments for f in e.run(self.lab)]
        except (InputError, UnsupportedModel) as error:
            why = str(error)
        except Exception as error:
            why = "out of memory"
            if not out_of_memory(error):
                broke = f"{type(error).__name__}: {error}"
        else:
            verdict, why = together([(f.verdict, f.why or f.says) for f in findings]) or (verdict, why)
        told = [f.to_dict() for f in findings]
        return Proof(told, verdict, why, broke, time.perf_counter() - start, self.machine)


class _Verify:
    """One run under way."""

    def __init__(self, model, claims, out, quick, again, seed, progress, done):
        self.model, self.quick, self.seed = model, quick, seed
        self.out = None if out is None else Path(out)
        self.progress, self.done = progress or (lambda line, share: None), done or (lambda result: None)
        self.identity = model_identity(model)
        self.found = Verification()
        self.todo: dict[str, Claim] = {}
        for name, claim in claims.items():
            finished = self._finished(name, claim, again)
            if finished is not None:
                self.found.results.append(finished)
            else:
                self.todo[name] = claim
        self.todo = dict(sorted(self.todo.items(), key=_texts))
        self.name, self.asked, self.most = "", 0, 0
        self.total = sum(_cost(c) for c in self.todo.values())
        self.alone = False

    def prover(self) -> Make:
        """What workers hold."""
        planned = tuple(e for c in self.todo.values() for e in c.experiments)
        return partial(Prover, planned, self.seed, self.quick)

    def __call__(self, hands: Crew) -> Verification:
        names = list(self.todo)
        shares = [0, *accumulate(_cost(c) for c in self.todo.values())]
        if isinstance(worker := getattr(hands, "worker", None), Prover):  # this process: every measurement can be told
            worker.lab.tick, self.alone = self._tick, True

        def begin(i: int) -> None:
            self.name, self.most = names[i], shares[i + 1]
            if self.alone:
                self.asked = shares[i]
            else:
                self.progress(f"{names[i]} begins", self.asked / self.total)

        try:
            for i, proof in hands.each(list(self.todo.values()), begin):
                if not self.alone:
                    self.asked += shares[i + 1] - shares[i]
                self._keep(names[i], self.todo[names[i]], proof)
        except KeyboardInterrupt:
            self.found.interrupted = True
        else:
            self.progress("done", 1.0)
        return self.found

    def _tick(self, line: str) -> None:
        self.progress(f"{self.name}: {line}", self.asked / self.total)
        self.asked = min(self.asked + 1, self.most)  # arms that are known already are asked for again

    # ------------------------------------------------------------------ one claim

    def _keep(self, name: str, claim: Claim, proof: Proof | Lost) -> None:
        if broke := proof.why if isinstance(proof, Lost) else proof.broke:
            self.found.failed[name] = broke
            return
        result = Result(
            name=name,
            paper=methods()[name].paper,
            words=claim.words,
            number=claim.number,
            setting=claim.setting,
            verdict=proof.verdict,
            why=proof.why,
            findings=proof.findings,
            plan=_plan(claim),
            quick=self.quick,
            meta=self._meta(name, proof),
        )
        if self.out is not None:
            _write(asdict(result), self._file(name))
        self.found.results.append(result)
        self.found.again.append(name)
        self.done(result)

    def _meta(self, name: str, proof: Proof) -> dict[str, Any]:
        versions = {"foveal": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        said = str(self.model.name_or_path)
        model = Path(said).name  # a folder's place is nobody's business
        on_hub = said.count("/") == 1 and said[0] not in "./~" and not Path(said).exists()
        options = [
            *([] if said in ("", DEFAULT_MODEL) else [f"--model {said if on_hub else model}"]),
            *(["--quick"] if self.quick else []),
            *([f"--seed {self.seed}"] if self.seed else []),
        ]
        return {
            "command": " ".join(["foveal verify", name, *options]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": model,
            "model_identity": self.identity | {"name": model},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **proof.machine,
            "versions": versions | {"python": platform.python_version()},
            "seed": self.seed,
            "seconds": round(proof.seconds, 1),
            "asked": self._most_asked,
        }

    @property
    def _most_asked(self) -> dict[str, int] | None:
        return QUICK if self.quick else None

    # ------------------------------------------------------------------ files

    def _file(self, name: str) -> Path:
        return self.out / (f"{name}.quick.json" if self.quick else f"{name}.json")

    def _finished(self, name: str, claim: Claim, again: bool) -> Result | None:
        """What an earlier run wrote, if it asked the same."""
        if self.out is None or not (file := self._file(name)).exists():
            return None
        result = read(file)
        if result.meta["model_identity"]["weights"] != self.identity["weights"]:
            raise InputError(
                f"{file} holds the result of {result.meta['model']}, another model: choose another folder with --out"
            )
        if again or (result.verdict == UNTESTABLE and claim.experiments):  # what was lacking may be there now
            return None
        same = result.plan == _plan(claim) and result.meta["seed"] == self.seed
        return result if same and result.meta["asked"] == self._most_asked else None


def together(parts: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The verdict over several findings (verdict, reason), with the reasons of those that decided it; None for none.

    A claim holds when all of it holds. What was measured not to hold decides before what was void.
    """
    for verdict in (FAILS, VOID):
        if reasons := [why for v, why in parts if v == verdict]:
            told = "; ".join(dict.fromkeys(reasons))
            return verdict, told if verdict == VOID else f"not so: {told}"
    return (HOLDS, "") if parts else None


def read(file: str | Path) -> Result:
    """A result from its file; raises InputError where that is damaged."""
    try:
        result = Result(**json.loads(Path(file).read_text(encoding="utf-8")))
        _check(result)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"expected a result of `foveal verify`, but '{file}' is not one ({error}): remove it"
        ) from error
    return result


def _check(result: Result) -> None:
    """Raise ValueError, TypeError or KeyError unless all is there that tables and later runs look at."""
    if lacking := _META - set(result.meta):
        raise ValueError(f"no {', '.join(sorted(lacking))} in its meta")
    if result.verdict not in (HOLDS, FAILS, VOID, UNTESTABLE):
        raise ValueError(f"no verdict is called {result.verdict!r}")
    result.meta["model_identity"]["weights"]
    for finding in result.findings:
        Finding(**finding)


def _write(data: dict, file: Path) -> None:
    """Whole or not at all."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            whole = Path(folder) / file.name
            whole.write_text(text, encoding="utf-8")
            whole.replace(file)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}; choose another folder") from error


def _plan(claim: Claim) -> list[str]:
    """The experiments as they are written; where the question is no part of the prompt is the usual case and goes without saying."""
    return [repr(e).replace(", query_aware=False", "") for e in claim.experiments]


def _cost(claim: Claim) -> int:
    return max(1, sum(e.cost for e in claim.experiments))


def _texts(item: tuple[str, Claim]) -> tuple:
    """Claims on the same texts follow each other, so that what was read serves the next."""
    cells = sorted({str(cell) for e in item[1].experiments for _, cell in e.arms() if cell is not None})
    return cells, item[0]

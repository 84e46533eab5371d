"""One model in several processes: transformers' tensor parallel plan cuts the weights, and each rank runs an engine over its own heads.

The engines stay in step because nothing that decides differs between them: rank 0 tells the others which requests have come and
which are over, hands them the tokens it chose, and what depends on the size of caches, which differ by head, goes by the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from ..default_model import default_folder
from ..errors import FovealError
from ..hub import DEFAULT_MODEL, default_device, explained, load
from ..method import Method
from ..profile import Profile
from ..spec import parse, written
from ..store import Layout
from .engine import Engine
from .menu import Menu
from .ranks import First, Other
from .shards import check_apart, check_shards, keep_own_heads
from .wire import Form, Garbled
from .worker import Worker


@dataclass(frozen=True)
class Job:
    """What each rank loads and runs, as it can be written in JSON. made_for: the model that a profile names. settings: the others of
    `Engine`, methods as text."""

    source: str | None
    device: str
    dtype: str | None
    made_for: dict[str, Any] | None
    layout: Layout | None
    settings: dict[str, Any]

    def model(self, ranks: First | Other):
        """`(model, tokenizer)`, the model this rank's share. Raises InputError for a profile of another model."""
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks.count))
        ranks.meet(self.device)
        model, tokenizer = load(self.source, device=self.device, dtype=self.dtype, shards=ranks.count)
        if self.made_for is not None:  # on every rank, for a look at the weights needs all their shares
            Profile(parse(self.settings["method"]), self.made_for).check(model)
        keep_own_heads(model, ranks.count)
        return model, tokenizer


JOB = Form(tuple[Job])


def start(
    source: str | None,
    count: int,
    *,
    device: str | None = None,
    dtype: str | None = None,
    profile: Profile | None = None,
    max_waiting: int = 64,
    max_per_key: int | None = None,
    **settings: Any,
) -> tuple[Worker, Any]:
    """A worker on a model that `count` processes hold together, this one among them, and the tokenizer.

    source, device, dtype: as for `foveal.load`. profile: its method and layout are used. The rest as for `Worker`; memory is that of all
    processes together. When one of them is lost the worker is dead, for good.
    Raises InputError before anything is loaded for a model or a method whose heads cannot be split, and for a profile of another model.
    """
    device = torch.device(device or default_device())
    layout = settings.pop("layout", None)
    if profile is not None:
        settings["method"], layout = profile.method, profile.layout
    if isinstance(settings.get("method"), Method):
        settings["method"] = written(settings["method"])
    config = _config(source)
    check_shards(config, count, device)
    asked = {"method": None, "budget": None, "allow": {}, "budgets": (), **settings}
    check_apart(Menu(*(asked[name] for name in ("method", "budget", "allow", "budgets"))), config)
    job, ranks = Job(source, str(device), dtype, profile and profile.model, layout, settings), First(count)
    try:
        ranks.tell(job)
        model, tokenizer = job.model(ranks)
        limits = {"max_waiting": max_waiting, "max_per_key": max_per_key}
        worker = Worker(model, tokenizer, ranks=ranks, layout=layout, **limits, **settings)
        ranks.gather("ready")
    except Exception as error:
        why = ranks.explained(error)
        ranks.close(gently=False)
        raise why from error
    return worker, tokenizer


def _config(source: str | None):
    try:
        return AutoConfig.from_pretrained(default_folder() if source in (None, DEFAULT_MODEL) else source)
    except (OSError, ValueError) as error:
        raise explained(str(source), error, local=False) from error


def follow(rank: str, count: str, link: str, lifeline: str, folder: str) -> int:
    """What a process does that rank 0 started; its exit code."""
    transformers_logging.disable_progress_bar()
    ranks = Other(int(rank), int(count), int(link), int(lifeline), folder)
    try:
        (job,) = ranks.hear(JOB)
        engine = Engine(*job.model(ranks), ranks=ranks, layout=job.layout, **job.settings)
        ranks.gather("ready")
    except FovealError as error:
        ranks.fail(str(error))
        return 2
    except (EOFError, Garbled):  # rank 0 is gone, or what it said is in the log
        return 1
    try:
        engine.follow()
    except (EOFError, Garbled):
        return 1
    engine.close()
    ranks.close()
    return 0

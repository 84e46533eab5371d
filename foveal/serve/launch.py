"""From the options of `foveal serve` to a service: everything that can be refused is, before anything is loaded or opened."""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import disable_created_metrics

from ..default_model import default_folder
from ..errors import InputError, ModelFileError
from ..hub import DEFAULT_MODEL, check_files, explained, load, load_processor, load_tokenizer, reads_images
from ..method import Budget
from ..profile import Profile, chosen, load_profile
from ..spec import written
from .app import Service
from .fetch import Fetcher
from .keys import Keys
from .limits import Guard, Limits, is_loopback
from .menu import DEFAULT, Menu
from .run import HttpServer, end_with, log_to_stderr
from .sight import Sight
from .together import start
from .worker import Worker

_WITH_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")  # not all GGUFs of a repository


@dataclass(frozen=True)
class Plan:
    """What to serve, how and for whom: the command's options by the same names. memory in GiB, deadline in seconds. tensor_parallel:
    processes that hold the model together."""

    model: str | None = None
    method: str | None = None
    budget: Budget | None = None
    profile: str | None = None
    allow: tuple[str, ...] = ()
    budgets: tuple[Budget, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None
    without_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    open_metrics: bool = False
    name: str | None = None
    memory: float = 2.0
    context: int | None = None
    max_running: int = 64
    max_waiting: int = 64
    max_per_key: int | None = None
    max_choices: int = 8
    deadline: float = 600.0
    device: str | None = None
    dtype: str | None = None
    tensor_parallel: int = 1
    image_hosts: tuple[str, ...] = ()

    @property
    def authority(self) -> str:
        """Host and port as in an address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def wanted(self) -> str | None:
        """The model named here, else the profile's; None is the default model."""
        return self.model or (load_profile(self.profile).model.get("name") if self.profile else None) or None

    @property
    def keys(self) -> Keys:
        """The API keys."""
        return Keys.read(self.api_keys, self.api_key_file)

    @property
    def limits(self) -> Limits:
        """What one request may ask for: never more choices than could wait at once, or than one key may have."""
        choices = min(self.max_choices, self.max_waiting, self.max_per_key or self.max_choices)
        return Limits(deadline=self.deadline, choices=choices)

    @property
    def offered(self) -> dict[str, str]:
        """Methods a request may name, with their specifications. Raises InputError for names that are none or given twice."""
        found = {}
        for text in self.allow:
            # A name has no brackets: "h2o(budget=0.5)" is a specification and its own name.
            name, equals, spec = text.partition("=")
            if not equals or "(" in name:
                name = spec = text
            name = name.strip()
            if name in ("", DEFAULT, *found):
                taken = f"'{name}' is the server's own method" if name == DEFAULT else f"'{name}' is there already"
                raise InputError(f"--allow {text}: {taken if name else 'the name is empty'}: choose another name")
            found[name] = spec.strip()
        return found

    def check(self) -> Profile | None:
        """Raise InputError for anything that is wrong already without the model; returns the profile, if there is one."""
        profile, method = chosen(self.method, self.budget, self.profile)
        Menu(method, None, self.offered, self.budgets)
        for option, value in (("--memory", self.memory), ("--deadline", self.deadline)):
            if not math.isfinite(value) or value <= 0:
                raise InputError(f"{option} {value}: expected a number above 0")
        self.fetcher()  # refuses hosts that are none
        if self.context is not None and self.context < 2:
            raise InputError(f"--context {self.context}: expected at least 2 tokens, one to read and one to write")
        if not self.keys and not self.without_key and not is_loopback(self.host):
            raise InputError(
                f"--host '{self.host}' lets other machines in, and there is no API key: set FOVEAL_API_KEY, or say --without-key"
            )
        if self.model is not None and Path(self.model).expanduser().is_dir():
            check_files(self.model)
        return profile

    def fetcher(self) -> Fetcher | None:
        """Of images from the hosts named here."""
        return Fetcher(self.image_hosts) if self.image_hosts else None

    def worker(self):
        """Load the model and start an engine: `(worker, tokenizer)`. Raises InputError for a profile of another model, or
        memory that cannot hold one request."""
        profile, source, method, budget = self.check(), safe_source(self.wanted), self.method, self.budget
        settings = {
            "allow": self.offered,
            "budgets": self.budgets,
            "memory": int(self.memory * 2**30),
            "max_waiting": self.max_waiting,
            "max_running": self.max_running,
            "max_per_key": self.max_per_key,
            "context": self.context,
        }
        where = {"device": self.device, "dtype": self.dtype}
        sees = _reads_images(source)
        if self.image_hosts and not sees:
            raise InputError("--image-hosts are for a model that reads images: leave them out")
        if self.tensor_parallel > 1:
            if sees:
                raise InputError(
                    "--tensor-parallel cannot hold a model that reads images: leave it out, so that one process holds the model"
                )
            return start(
                source, self.tensor_parallel, profile=profile, method=method, budget=budget, **where, **settings
            )
        model, tokenizer = load(source, **where)
        if profile is not None:
            profile.check(model)
            method = written(profile.method)
        layout, sight = profile.layout if profile else None, None
        if sees:
            sight = Sight(model, load_processor(source))
        worker = Worker(model, tokenizer, method=method, budget=budget, layout=layout, sight=sight, **settings)
        return worker, tokenizer

    def replica(self):
        """As `worker`, for a process that others stand in for: it ends at once when another one that holds the model with it is lost."""
        worker, tokenizer = self.worker()
        if self.tensor_parallel > 1:
            worker.ranks.on_lost = lambda why: os._exit(1)
        return worker, tokenizer

    def tokenizer(self):
        """The model's tokenizer alone, for a process that has no model."""
        source = safe_source(self.wanted)
        folder = default_folder() if source in (None, DEFAULT_MODEL) else source
        return load_tokenizer(folder)

    def service(self, worker: Worker, tokenizer) -> Service:
        """The service around an engine."""
        disable_created_metrics()  # a time beside every counter, which no dashboard asks for
        return Service(
            worker,
            tokenizer,
            name=self.name or self.wanted or DEFAULT_MODEL,
            keys=self.keys,
            guard=Guard(self.host, self.allowed_hosts),
            limits=self.limits,
            max_waiting=self.max_waiting,
            open_metrics=self.open_metrics,
            details={"budgets": list(self.budgets), "images": getattr(worker, "sight", None) is not None},
            fetcher=self.fetcher(),
        )

    def serve(self, listener: socket.socket, say: Callable[[str], None]) -> None:
        """Serve on a listening socket until a signal to stop; `say` hears when the model is there. Raises what loading raises."""
        log_to_stderr()
        server = HttpServer(lambda: self.service(*self.worker()), self.limits)

        def ready() -> None:
            doing = server.service.worker.methods.get("default", "dense")
            keyed = "with API keys" if self.keys else "without API keys"
            if self.tensor_parallel > 1:
                doing += f", {self.tensor_parallel} processes"
                server.watch(end_with(server.service.worker))
            say(
                f"serving {server.service.name} ({doing}) at http://{self.authority}, {keyed}; chat page at /, Ctrl-C stops"
            )

        asyncio.run(server.run_on(listener, ready))


def _reads_images(source: str | None) -> bool:
    try:
        # Of a file that is no folder loading says so, and does not read it for that.
        return source not in (None, DEFAULT_MODEL) and Path(source).is_dir() and reads_images(source)
    except Exception as error:
        raise explained(str(source), error, local=True) from error


def safe_source(model: str | None) -> str | None:
    """A name `foveal.load` takes; for a hub id the folder of its safetensors and what belongs to them, with nothing else."""
    if model in (None, DEFAULT_MODEL):
        return model
    if (local := Path(model).expanduser()).exists():
        return str(local)
    import huggingface_hub

    for offline in (True, False):
        try:
            folder = huggingface_hub.snapshot_download(model, allow_patterns=_WITH_WEIGHTS, local_files_only=offline)
            check_files(folder)
            return folder
        except Exception as error:  # the first time: not cached
            if not offline:
                raise error if isinstance(error, ModelFileError) else explained(model, error, local=False) from error
    return model

"""Many engines behind one API, on Ray Serve: replicas that hold a model each, and a front that speaks HTTP and retries.

The front is the same application as on one machine; its worker is not an engine but a way to the replicas. When a replica dies, what it
was answering is asked anew of another and goes on where it stopped: every request has a seed, so its tokens are the same there.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import fields, replace
from typing import Any

from ..errors import InputError
from ..hub import default_device
from .app import Service, build_app
from .launch import Plan
from .request import Event, Full, Request, Stats, Stream, Unavailable, Usage
from .run import listen, log_to_stderr

try:
    import ray
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import ReplicaUnavailableError
    from ray.serve.request_router import FIFOMixin, RequestRouter
except ModuleNotFoundError as error:
    raise InputError(f"{error.name} is not installed, which --ray needs: pip install 'foveal[serve,ray]'") from None

log = logging.getLogger("foveal.serve")
PREFIX = 64  # tokens of a prompt by which requests that may share a prefix find the same replica
_TRIES = 5
# The gate writes a line for each request, and Ray would for each question to a replica.
_QUIET = {"enable_access_log": False}
_GRACE = 30  # seconds for accepted requests when replicas go


class PrefixRouter(FIFOMixin, RequestRouter):
    """Sends requests with the same key, method and first tokens to the same replica (highest hash of both, so that a replica more or less
    moves few prompts), and to the next where that one has no room."""

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        """Ranks of replicas: Ray asks each in turn whether it takes the request."""
        if pending_request is None or not pending_request.args or not isinstance(pending_request.args[0], Request):
            return [candidate_replicas]
        mark = _mark(pending_request.args[0])
        ranked = sorted(candidate_replicas, key=lambda r: _hash(f"{mark} {r.replica_id.unique_id}"), reverse=True)
        return [[replica] for replica in ranked]


def _mark(request: Request) -> str:
    return f"{request.key} {request.method} {request.budget} {request.prompt_ids[:PREFIX]}"


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class Replica:
    """One engine in a Ray actor. make: builds `(worker, tokenizer)` there."""

    def __init__(self, make):
        self.worker, _ = make()
        self.described = {"methods": dict(self.worker.methods), "context": self.worker.context}

    def check_health(self) -> None:
        """Ray replaces the replica when this raises."""
        if not self.worker.alive:
            raise RuntimeError("the engine has stopped")

    async def describe(self) -> dict[str, Any]:
        """Methods and context, as the worker has them."""
        return self.described

    async def stats(self) -> Stats:
        """Of this engine."""
        return self.worker.stats()

    async def kept(self, id: str) -> list[list[int]] | None:
        """As the worker's; None from replicas that do not run the request."""
        return await asyncio.to_thread(self.worker.kept, id)

    async def generate(self, request: Request, left: float | None):
        """Events of a request. left: seconds to its deadline, for clocks of machines differ. Refusals come as the first item."""
        deadline = None if left is None else time.monotonic() + left
        try:
            stream = self.worker.submit(replace(request, deadline=deadline))
        except (Full, Unavailable, InputError) as error:
            yield error
            return
        try:
            yield None  # accepted
            async for event in stream:
                yield event
        finally:
            stream.cancel()  # harmless when it is over; else the front has left


class RemoteWorker:
    """A `Worker` in all that the application asks of one, over a handle to replicas. max_live: requests in flight before it says Full;
    max_per_key: of one API key, whichever replicas they are on."""

    def __init__(self, handle, described: dict[str, Any], *, max_live: int, max_per_key: int | None = None):
        self._handle, self._described, self.max_live, self.max_per_key = handle, described, max_live, max_per_key
        self._live: dict[asyncio.Task, str] = {}  # and whose
        self._draining = False
        self._heard = True
        self._stats = Stats()
        self._finished: Counter[str] = Counter()
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="foveal-replicas", daemon=True).start()
        threading.Thread(target=self._look, name="foveal-stats", daemon=True).start()

    @property
    def methods(self) -> dict[str, str]:
        """As the replicas' workers have them."""
        return self._described["methods"]

    @property
    def context(self) -> int:
        """As the replicas' workers have it."""
        return self._described["context"]

    @property
    def alive(self) -> bool:
        """The front can pass requests on; Ray itself replaces replicas."""
        return not self._closed.is_set()

    @property
    def full(self) -> bool:
        """As many are in flight as the replicas can run and hold waiting."""
        return len(self._live) >= self.max_live

    def submit(self, request: Request) -> Stream:
        """Pass a request on, and wait until a replica has taken or refused it. Raises what a worker raises."""
        if self._draining or not self.alive:
            raise Unavailable("the server is shutting down: send the request elsewhere")
        if self.full:
            raise Full(f"{self.max_live} requests are being worked on, which is all there is room for", 1)
        if self.max_per_key is not None and list(self._live.values()).count(request.key) >= self.max_per_key:
            raise Full(f"this key has {self.max_per_key} requests running or waiting, which is all it may have", 1)
        if request.sampling.seed is None:
            # With a seed of its own any request can go on elsewhere with the same tokens.
            request = replace(request, sampling=replace(request.sampling, seed=random.getrandbits(63)))
        stream, taken = Stream(request), Future()
        self._loop.call_soon_threadsafe(self._begin, request, stream, taken)
        taken.result()
        return stream

    def stats(self) -> Stats:
        """The replicas' sums, at most a second old; requests as the front counts them."""
        found = self._stats
        live = len(self._live)
        running = min(live, found.running)
        own = {"running": running, "waiting": live - running, "finished": dict(self._finished)}
        return replace(found, alive=self.alive, draining=self._draining, **own)

    def kept(self, id: str, timeout: float = 5.0) -> list[list[int]] | None:
        """As the worker's, from the replica that runs the request."""
        return next((found for found in self._ask_all("kept", id, timeout=timeout) if isinstance(found, list)), None)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those accepted."""
        self._draining, end = True, time.monotonic() + (1e9 if timeout is None else timeout)
        while self._live and time.monotonic() < end:
            time.sleep(0.02)
        return not self._live

    def close(self) -> None:
        """End now; requests still running are cancelled."""
        self._closed.set()
        for task in list(self._live):
            self._loop.call_soon_threadsafe(task.cancel)

    def restart(self) -> None:
        """Nothing to do: the front has no engine of its own."""

    def _begin(self, request: Request, stream: Stream, taken: Future) -> None:
        task = self._loop.create_task(self._pass_on(request, stream, taken))
        self._live[task] = request.key
        task.add_done_callback(self._live.pop)
        stream.on_cancel = lambda: self._loop.call_soon_threadsafe(task.cancel)

    async def _pass_on(self, request: Request, stream: Stream, taken: Future) -> None:
        """Events of a replica into the stream; of another one from the same token on, when the first is lost."""
        shown: list[int] = []
        try:
            for attempt in range(_TRIES):
                try:
                    last = await self._from_one(request, stream, taken, shown)
                    break
                except _LOST as error:
                    log.warning("a replica was lost (%s), its request goes to another", type(error).__name__)
                    await asyncio.sleep(0.2 * 2**attempt)
            else:
                last = Event("error", text="the replicas that ran this request were lost")
        except asyncio.CancelledError:
            last = Event("end", finish="cancelled", usage=Usage(len(request.prompt_ids), len(shown)))
        except Exception as error:
            if not taken.done():
                taken.set_exception(error)
                return
            last = Event("error", text=f"the request could not be passed on ({type(error).__name__})")
        self._finished[last.finish or "error"] += 1
        stream.put(last)
        if not taken.done():
            taken.set_result(None)

    async def _from_one(self, request: Request, stream: Stream, taken: Future, shown: list[int]) -> Event:
        """The last event of one replica's answer; tokens past those shown already go into the stream."""
        left = None if request.deadline is None else request.deadline - time.monotonic()
        answer = self._handle.options(stream=True).generate.remote(request, left)
        seen = 0
        try:
            async for item in answer:
                if isinstance(item, Exception):  # accepted once: another try, elsewhere or later
                    raise _Busy if taken.done() else item
                if not taken.done():
                    taken.set_result(None)
                if item is None:
                    continue
                if item.kind != "token":
                    return item
                seen += 1
                if seen > len(shown):
                    shown.append(item.token)
                    stream.put(item)
                elif item.token != shown[seen - 1]:
                    return Event("error", text="another replica gave other tokens")
        except asyncio.CancelledError:
            answer.cancel()
            raise
        raise _Busy  # it ended without a last event

    def _look(self) -> None:
        while not self._closed.wait(0.5):
            found = [stats for stats in self._ask_all("stats", timeout=5.0) if isinstance(stats, Stats)]
            if found:
                self._stats = _sum(found)

    def _ask_all(self, name: str, *arguments: Any, timeout: float) -> list[Any]:
        """What every replica says; an exception for one that is going, nothing where none is there."""
        try:
            found = self._handle.broadcast(name, *arguments).results(timeout_s=timeout, return_exceptions=True)
        except Exception as error:
            if self._heard:
                log.warning("the replicas could not be asked: %s", type(error).__name__)
            self._heard = False
            return []
        self._heard = True
        return found


class _Busy(Exception):
    """A replica that took a request before cannot go on with it now."""


_LOST = (RayActorError, ReplicaUnavailableError, _Busy)


def _sum(found: list[Stats]) -> Stats:
    total = {f.name: sum(getattr(s, f.name) for s in found) for f in fields(Stats) if f.type in ("int", "float")}
    total["scheduling"] /= len(found)
    return Stats(**total)


class Front:
    """Ray's way in: the application around a RemoteWorker. make: from a worker to the service."""

    async def __init__(self, engines, make, bounds: dict[str, int | None]):
        described = await engines.describe.remote()
        self._app = build_app(make(RemoteWorker(engines, described, **bounds)))

    def __serve_build_asgi_app__(self):
        return self._app


def application(
    make_worker,
    make_service,
    *,
    replicas: int | tuple[int, int] = 1,
    max_running: int = 64,
    max_waiting: int = 64,
    max_per_key: int | None = None,
    **resources,
):
    """The Ray Serve application. make_worker() builds `(worker, tokenizer)` in a replica, make_service(worker) the service in the front.

    replicas: how many, or the fewest and the most, which then follow the load. resources: of one replica, as Ray names them (num_cpus,
    num_gpus).
    """
    few, most = (replicas, replicas) if isinstance(replicas, int) else replicas
    follow = {"min_replicas": few, "max_replicas": most, "target_ongoing_requests": max(1, max_running // 2)}
    scale = {"num_replicas": few} if few == most else {"autoscaling_config": follow}
    engines = serve.deployment(
        Replica,
        name="engine",
        max_ongoing_requests=max_running + max_waiting,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=_GRACE,
        logging_config=_QUIET,
        ray_actor_options=resources,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        **scale,
    ).bind(make_worker)
    front = serve.deployment(
        serve.ingress()(Front),
        name="front",
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=_GRACE,
        logging_config=_QUIET,
        ray_actor_options={"num_cpus": 0},
    )
    bounds = {"max_live": most * (max_running + max_waiting), "max_per_key": max_per_key}
    return front.bind(engines, make_service, bounds)


def serve_on_ray(plan: Plan, replicas: str) -> None:
    """`foveal serve --ray`: deploy on the cluster of $RAY_ADDRESS, or one started here, and stay until a signal to stop, which lets
    accepted requests finish. Raises InputError for a number of replicas that is none, a port in use here, or engines that do not start.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", replicas)
    few, many = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= few <= many:
        raise InputError(f"--replicas {replicas}: expected a number as 2, or a range as 1-8")
    keys = plan.keys  # digests: the keys themselves, and the file they are in, stay here
    plan = replace(plan, api_keys=(), api_key_file=None, without_key=True)
    if "RAY_ADDRESS" not in os.environ:
        listen(plan.host, plan.port).close()  # else Ray's proxy would try for ever
    gpu = (plan.device or str(default_device())).startswith("cuda")

    def service(worker: RemoteWorker) -> Service:
        log_to_stderr()  # of the front's process: Ray passes it on
        made = plan.service(worker, plan.tokenizer())
        made.keys = keys
        return made

    app = application(
        plan.replica,
        service,
        replicas=(few, many),
        max_running=plan.max_running,
        max_waiting=plan.max_waiting,
        max_per_key=plan.max_per_key,
        num_cpus=plan.tensor_parallel,
        num_gpus=int(gpu) * plan.tensor_parallel,
    )
    log_to_stderr()
    try:
        http = {"host": plan.host, "port": plan.port}
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=_QUIET)
    except Exception as error:  # Ray's own are of many kinds
        raise InputError(f"Ray cannot be started or reached: {_reason(str(error))}") from error
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        serve.run(app, name="foveal", blocking=False)
        log.info("serving at http://%s, %s engines; Ctrl-C stops", plan.authority, replicas)
        threading.Event().wait()
    except _Stop:
        log.info("stopping: accepted requests have %d s", _GRACE)
    except RuntimeError as error:
        deployments = serve.status().applications["foveal"].deployments
        said = "\n".join([str(error), *(found.message for found in deployments.values())])
        raise InputError(f"the engines did not start: {_reason(said)}") from error
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # once is enough: replicas are given their time
        serve.delete("foveal")
        ray.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop(BaseException):
    """A signal to stop."""


def _stop(*_) -> None:
    raise _Stop


def _reason(text: str) -> str:
    """What a replica's own exception said, out of the traceback that Ray quotes."""
    found = re.findall(r"(?m)^\S*(?:Error|UnsupportedModel): (.+)$", text)
    return found[-1] if found else text.partition("\n")[0]

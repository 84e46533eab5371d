"""One server process: it answers "loading" at once, serves when the model is there, and drains before it ends."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress

import uvicorn

from ..errors import InputError
from .app import Service, build_app
from .limits import Limits, bounded_protocol
from .schema import ApiError
from .worker import Worker

log = logging.getLogger("foveal.serve")
FD, LIFELINE = "FOVEAL_SERVE_FD", "FOVEAL_SERVE_LIFELINE"
"""Environment of a supervised process: the listening socket, and a pipe that closes when the supervisor is gone."""
_DEATHS, _WITHIN = 5, 60.0  # so many deaths in so many seconds, and the supervisor gives up


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError where the port is taken or the address is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family, backlog=512)
        found.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # else a short piece waits 40 ms for the last one's receipt
        return found
    except OSError as error:
        if isinstance(error, socket.gaierror):
            raise InputError(f"--host {host} is no address of this machine: use 127.0.0.1 or 0.0.0.0") from None
        reason = os.strerror(error.errno).lower()  # the error's own text says host and port again
        raise InputError(f"cannot listen on {host} port {port} ({reason}): choose another with --port") from None


def server_config(app, limits: Limits) -> uvicorn.Config:
    """uvicorn's settings: HTTP/1.1 alone, its own logs off (the gate writes them), the protocol bounded."""
    return uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        interface="asgi3",
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.headers,
        timeout_keep_alive=int(limits.header_time),
        timeout_graceful_shutdown=5,
    )


class HttpServer(uvicorn.Server):
    """uvicorn, except that a signal to stop first lets accepted requests finish while new ones get 503; a second one ends at once.

    make: builds the service, in a thread; an exception of it ends the server and comes out of `run`.
    """

    def __init__(self, make: Callable[[], Service], limits: Limits):
        self.service: Service | None = None
        self.failure: BaseException | None = None
        self._make, self._limits, self._inner = make, limits, None
        self._tasks: list[asyncio.Task] = []
        super().__init__(server_config(self._answer, limits))

    async def run_on(self, listener: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until stopped; `ready` is called when requests are taken. Raises what `make` raised."""
        self._loop, self._ready = asyncio.get_running_loop(), ready
        threading.Thread(target=self._load, name="load", daemon=True).start()
        await self.serve(sockets=[listener])
        for task in self._tasks:
            task.cancel()
        if self.service is not None:
            await asyncio.to_thread(self.service.worker.close)
        if self.failure is not None:
            raise self.failure

    def handle_exit(self, sig: int, frame) -> None:
        """From a signal handler or any thread: drain, then stop."""
        if self.service is None or self.service.draining:
            self.should_exit = self.force_exit = True
        else:
            self.service.draining = True
            self._loop.call_soon_threadsafe(lambda: self.watch(self._drain()))

    async def _drain(self) -> None:
        log.info("stopping: no new requests, those accepted have %.0f s", self._limits.drain)
        if not await asyncio.to_thread(self.service.worker.drain, self._limits.drain):
            log.warning("stopping: what was not done in time is cut off")
            await asyncio.to_thread(self.service.worker.close)
        self.should_exit = True

    def watch(self, work: Coroutine) -> None:
        """Run this beside the server until it stops. From its own loop."""
        self._tasks.append(self._loop.create_task(work))

    def _load(self) -> None:
        try:
            service = self._make()
            self._loop.call_soon_threadsafe(self._loaded, service)
        except BaseException as error:
            self.failure = error
            self.should_exit = self.force_exit = True

    def _loaded(self, service: Service) -> None:
        self.service, self._inner = service, build_app(service)
        self.watch(service.keep_alive())
        self._ready()

    async def _answer(self, scope, receive, send) -> None:
        if self._inner is not None:
            await self._inner(scope, receive, send)
        elif scope["type"] == "http":
            await ApiError(503, "the model is loading", code="loading", retry_after=2).response()(scope, receive, send)


async def end_with(worker: Worker, every: float = 0.2, grace: float = 1.0) -> None:
    """End this process when its engine has died, after `grace` seconds for clients to hear of it: the supervisor starts another.

    For a model held by several processes: it cannot be put together again, and a thread that waits for a lost one cannot be stopped.
    """
    while (why := worker.stats().why) is None:
        await asyncio.sleep(every)
    log.error("this process ends, for its engine died (%s)", why.partition(":")[0])
    await asyncio.sleep(grace)
    os._exit(1)


def supervise(listener: socket.socket, argv: list[str]) -> int:
    """Run `foveal ARGV` on the listening socket in a process of its own, and another one when it is killed or crashes; the exit code.

    Clients that connect in between wait in the socket's queue. A process that ends by itself, with 0 or with 2 for bad input, is not
    replaced; nor is one that dies again and again.
    """
    reading, writing = os.pipe()
    environment = {**os.environ, FD: str(listener.fileno()), LIFELINE: str(reading)}
    stopping, deaths, child = False, [], None

    def stop(*_) -> None:
        nonlocal stopping
        stopping = True
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGTERM)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            command = [sys.executable, "-m", "foveal.cli", *argv]
            # A session of its own: a terminal's Ctrl-C comes to the supervisor alone, and is passed on once.
            child = subprocess.Popen(
                command, env=environment, pass_fds=(listener.fileno(), reading), start_new_session=True
            )
            if stopping:
                stop()
            code = child.wait()
            if stopping or code in (0, 2):
                return max(code, 0)
            deaths = [t for t in deaths if time.monotonic() - t < _WITHIN] + [time.monotonic()]
            if len(deaths) >= _DEATHS:
                log.error("the server died %d times within a minute: giving up", _DEATHS)
                return 1
            log.error("the server died (exit code %d); a new one starts", code)
            time.sleep(min(0.25 * 2 ** (len(deaths) - 1), 5.0))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)
        os.close(reading)


def inherited() -> socket.socket | None:
    """The supervisor's socket in a supervised process, which from now on also stops when the supervisor is gone; None elsewhere."""
    if FD not in os.environ:
        return None
    lifeline = int(os.environ[LIFELINE])

    def watch() -> None:
        os.read(lifeline, 1)  # returns when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    return socket.socket(fileno=int(os.environ[FD]))


class _Tolerant(io.TextIOBase):
    """Standard error whose disk may be full or whose terminal may be gone without anybody who writes to it failing."""

    encoding, errors = "utf-8", "replace"

    def write(self, text: str) -> int:
        with suppress(OSError):
            os.write(2, text.encode(self.encoding, self.errors))
        return len(text)

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return os.isatty(2)

    def writable(self) -> bool:
        return True


def tolerate_full_disk() -> None:
    """From here on nothing that is said on standard error, by whatever library, can raise."""
    sys.stderr = _Tolerant()


def log_to_stderr() -> None:
    """The server's log on standard error, a line an entry, control characters escaped."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Escaped("%(asctime)s %(levelname)s %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().format(record))

"""The HTTP application: routes, and the gate before them that knows keys, origins, request ids and what is logged."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
import uuid
from contextlib import aclosing, suppress
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from .. import __version__
from .api import Api, Job
from .engine import where
from .fetch import Fetcher
from .keys import Keys
from .limits import Guard, Limits, announced_length, read_body
from .metrics import Metrics
from .schema import ApiError, ChatRequest, Common, CompletionRequest
from .worker import Worker

log = logging.getLogger("foveal.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_COPIES = 3  # of a large body in memory at once: as it came, as text, and the files in it
LEFT = 499  # nginx's word for a client that closed the connection before its answer
_NOT_FOUND = "there is no such route here: see /openapi.json"


class Service:
    """Everything behind the routes. `draining` makes every new request 503."""

    def __init__(
        self,
        worker: Worker,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        keys: Keys | None = None,
        guard: Guard | None = None,
        limits: Limits | None = None,
        max_waiting: int = 64,
        open_metrics: bool = False,
        details: dict[str, Any] | None = None,
        fetcher: Fetcher | None = None,
    ):
        self.worker, self.name, self.details = worker, name, details or {}
        self.keys, self.guard, self.limits = keys or Keys(), guard or Guard("127.0.0.1"), limits or Limits()
        self.metrics = Metrics(worker.stats)
        self.api = Api(
            worker,
            tokenizer,
            name=name,
            limits=self.limits,
            metrics=self.metrics,
            max_waiting=max_waiting,
            fetcher=fetcher,
        )
        self.public = {"/health", "/metrics"} if open_metrics else {"/health"}
        self.draining = False
        self.created = int(time.time())

    def state(self) -> str:
        """ "ok", "draining" or "dead"."""
        return "draining" if self.draining else "ok" if self.worker.alive else "dead"

    async def keep_alive(self, every: float = 0.5) -> None:
        """Replace an engine that died, at longer and longer intervals while it keeps dying. Runs until cancelled."""
        pause, alive_since = 1.0, time.monotonic()
        while True:
            await asyncio.sleep(every)
            if self.worker.alive or self.draining:
                pause = 1.0 if time.monotonic() - alive_since > 60 else pause
                continue
            log.error(
                "the engine died (%s); a new one starts", (self.worker.stats().why or "no reason").partition(":")[0]
            )
            with suppress(Exception):  # a restart that fails is tried again
                await asyncio.to_thread(self.worker.restart)
                self.metrics.restarts.inc()
            alive_since = time.monotonic()
            await asyncio.sleep(0 if self.worker.alive else pause)
            pause = min(2 * pause, 30.0)


def build_app(service: Service):
    """The ASGI application of a service: the gate with FastAPI's routes behind it."""

    app = FastAPI(title="Foveal", version=__version__, docs_url=None, redoc_url=None)
    app.openapi = lambda: _openapi(app)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(Exception, _broken)
    page, policy = _page()

    @app.get("/", response_class=HTMLResponse)
    async def chat_page() -> Response:
        """A page to chat with the model and to see which keys are kept."""
        return HTMLResponse(page, headers={"content-security-policy": policy, "cache-control": "no-store"})

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken, else 503."""
        state = service.state()
        if state == "ok":
            return JSONResponse({"status": "ok"})
        return ApiError(503, f"the server takes no requests: {state}", code=state, retry_after=1).response()

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model served, with the methods and budgets a request may name."""
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The model, by its name."""
        if name != service.name:
            raise ApiError(
                404,
                "this model is not served here: GET /v1/models lists what is",
                param="model",
                code="model_not_found",
            )
        return JSONResponse(_model(service))

    @app.post("/v1/chat/completions", openapi_extra=_body("ChatRequest"))
    async def chat(request: Request) -> Response:
        """Answer a conversation, in one piece or as server-sent events."""
        return await _generate(service, request, service.api.chat, ChatRequest)

    @app.post("/v1/completions", openapi_extra=_body("CompletionRequest"))
    async def completions(request: Request) -> Response:
        """Continue texts, in one piece or as server-sent events."""
        return await _generate(service, request, service.api.completion, CompletionRequest)

    return Gate(app, service)


async def _generate(service: Service, request: Request, make, kind: type[Common]) -> Response:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(400, "expected the header Content-Type: application/json", code="invalid_content_type")
    limits = service.limits
    length, longest = announced_length(request.scope), service.api.longest_body(kind)
    large = limits.body < length <= longest
    with service.api.room.lent(_COPIES * length if large else 0):
        try:
            most = longest if large else limits.body
            body = await asyncio.wait_for(read_body(request.scope, request.receive, most), limits.body_time)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="body_timeout") from None
        except ConnectionError:
            return Left()
        job = await make(body, request.scope["state"]["key"])
    request.scope["state"]["job"] = job
    return Reply(job, limits)


class Left(Response):
    """No answer, for nobody is there to read one."""

    async def __call__(self, scope, receive, send) -> None:
        scope["state"]["left"] = True


class Reply(Response):
    """A job's answer over ASGI. A client that leaves, or stops reading, cancels the job."""

    def __init__(self, job: Job, limits: Limits):
        super().__init__()
        self.job, self.limits = job, limits

    async def __call__(self, scope, receive, send) -> None:
        work = asyncio.create_task(self._stream(send) if self.job.request.stream else self._whole(scope, receive, send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                scope["state"]["left"] = True
        except TimeoutError:
            scope["state"]["left"] = True
            abort = scope["state"].get("abort")
            if abort is not None:
                abort()
        finally:
            self.job.cancel()  # harmless when it is over
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _whole(self, scope, receive, send) -> None:
        answer = await self.job.whole()
        await JSONResponse(answer)(
            scope, receive, lambda message: asyncio.wait_for(send(message), self.limits.send_time)
        )

    async def _stream(self, send) -> None:
        async def put(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self.limits.send_time)

        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await put({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self.job.chunks()) as chunks:
            async for chunk in chunks:
                await put({"type": "http.response.body", "body": chunk, "more_body": True})
        await put({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Gate:
    """Before every route: who calls and from where, a request id, errors in one shape, one line in the log, one count in the metrics."""

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":  # nothing to begin or end, but some servers wait for the words
            for done in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
                await receive()
                await send({"type": done})
        if scope["type"] != "http":
            return
        began, headers = time.monotonic(), _headers(scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        status = LEFT

        async def numbered(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {
                    **message,
                    "headers": [*message.get("headers", []), *own, (b"referrer-policy", b"no-referrer")],
                }
            await send(message)

        try:
            self._admit(scope["path"], headers, state)
            await self.app(scope, receive, numbered)
        except ApiError as error:
            await error.response(browser=scope["path"] == "/")(scope, receive, numbered)
        except Exception as error:
            log.error("%s failed: %s", request_id, where(error))  # FastAPI has sent its answer before it raises
        finally:
            status = LEFT if state.get("left") else status
            self.service.metrics.answered(scope["path"], status)
            _line(scope, state, request_id, status, time.monotonic() - began)

    def _admit(self, path: str, headers: dict[str, str], state: dict[str, Any]) -> None:
        self.service.guard.check(headers)
        state["key"] = self.service.keys.who(headers)
        if path in self.service.public:
            return
        if state["key"] is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if path.startswith("/v1/") and self.service.draining:
            raise ApiError(503, "the server is stopping: try again in a second", code="draining", retry_after=1)


def _headers(scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1"), value.decode("latin-1"))
    return found


def _line(scope, state: dict[str, Any], request_id: str, status: int, seconds: float) -> None:
    """One line for a request: ids, counts and times, never paths that callers made up, prompts or keys."""
    route = getattr(scope.get("route"), "path", "-")
    job: Job | None = state.get("job")
    tokens = ""
    if job is not None:
        read = {c.prompt: len(c.stream.request.prompt_ids) for c in job.choices}
        tokens = f" prompt={sum(read.values())} generated={sum(c.tokens for c in job.choices)}"
    failed = "" if job is None or job.failed is None else f" failed={job.failed.code}"
    method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "-"
    who = state.get("key") or "-"
    log.info("%s %s %s %s %d %.0fms%s%s", request_id, who, method, route, status, 1000 * seconds, tokens, failed)


async def _api_error(_: Request, error: ApiError) -> Response:
    return error.response()


async def _broken(*_) -> Response:
    return ApiError(500, "the server failed on this request", code="internal_error").response()


async def _http_error(_: Request, error: HTTPException) -> Response:
    message, code = (_NOT_FOUND, "not_found") if error.status_code == 404 else (str(error.detail), None)
    response = ApiError(error.status_code, message, code=code).response()
    response.headers.update(error.headers or {})
    return response


def _model(service: Service) -> dict[str, Any]:
    described = {"methods": service.worker.methods, "context": service.worker.context, **service.details}
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "foveal",
        "foveal": described,
    }


def _page() -> tuple[str, str]:
    """The chat page and the content policy under which only its own script and style run, and only this server is called."""
    text = resources.files("foveal.serve").joinpath("static/chat.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in found)

    rules = [
        "default-src 'none'",
        f"script-src {hashes('script')}",
        f"style-src {hashes('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return text, "; ".join(rules)


def _body(name: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description with the bodies this server reads itself, and the one shape of its errors."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        kinds = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
        _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
        part = {"type": ["string", "null"]}
        fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": part, "code": part}
        error = {"type": "object", "required": [*fields], "properties": fields}
        shape = {"type": "object", "required": ["error"], "properties": {"error": error}}
        found["components"] = {"schemas": {**schemas["$defs"], "Error": shape}}
        answer = {
            "description": "error",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"] = {"200": operation["responses"]["200"], "4XX": answer, "5XX": answer}
        app.openapi_schema = found
    return app.openapi_schema

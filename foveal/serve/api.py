"""OpenAI's chat and text completions over a worker: a request becomes one generation for each choice, their events one answer."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from .fetch import Fetcher, files_of
from .images import Place, Room, Viewer, check_places, places
from .limits import Limits
from .metrics import Metrics
from .prompt import Prompts
from .request import Event, Request, Sampling, Stream, Usage
from .schema import ApiError, ChatRequest, Common, CompletionRequest, as_api_error, parse_body
from .sight import Pictures
from .worker import Worker

_LOWEST = -9999.0  # JSON has no infinity: what OpenAI writes for a probability of nought
_PICTURE = 0.25  # seconds between two pictures of the keys kept
# Not the engine's own words: those of an exception may quote another caller's prompt.
_FAILED = "the engine failed on this request: try again"
DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """One generation of a job, and what has come of it."""

    index: int
    prompt: int  # which of the request's prompts
    stream: Stream
    text: str = ""
    entries: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    shown: int = 0  # characters sent as chunks
    finish: str | None = None
    usage: Usage = field(default_factory=Usage)

    @property
    def seen(self) -> int:
        """Tokens read and generated so far: what a cache that keeps everything would hold."""
        return len(self.stream.request.prompt_ids) + self.tokens


class Api:
    """Turns request bodies into jobs. `name` is the one model served; requests for another are 404. max_waiting: bodies read at once.
    fetcher: of images that a request names by an https URL (None: `data:` URLs alone)."""

    def __init__(
        self,
        worker: Worker,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        limits: Limits,
        metrics: Metrics,
        max_waiting: int,
        fetcher: Fetcher | None = None,
    ):
        self.worker, self.tokenizer, self.name, self.limits, self.metrics = worker, tokenizer, name, limits, metrics
        self.max_waiting = max_waiting
        self.room, self.fetcher = Room(limits.images.memory), fetcher
        sight = getattr(worker, "sight", None)  # a cluster's workers are elsewhere, and have none
        self.viewer = None if sight is None else Viewer(sight, limits.images, self.room)
        self.prompts = Prompts(tokenizer, limits.render_time, self.viewer)
        self.fingerprint = "fv_" + uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {worker.methods.get('default')}").hex[:12]
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="prompt")
        self._submitters = ThreadPoolExecutor(64, thread_name_prefix="submit")  # on a cluster submitting waits
        self._viewers = ThreadPoolExecutor(1, thread_name_prefix="images")  # one request's at a time, and texts go on
        self._reading, self._looking = 0, Room(max_waiting)  # apart: texts do not wait for images

    def longest_body(self, kind: type[Common]) -> int:
        """Bytes that a body may have."""
        sees = kind is ChatRequest and self.viewer is not None
        return self.limits.body + (self.limits.images.body if sees else 0)

    async def chat(self, body: bytes, key: str) -> Job:
        """A job for `POST /v1/chat/completions`."""
        return await self._job(body, ChatRequest, key)

    async def completion(self, body: bytes, key: str) -> Job:
        """A job for `POST /v1/completions`."""
        return await self._job(body, CompletionRequest, key)

    async def _job(self, body: bytes, kind: type[Common], key: str) -> Job:
        # Refused before any reading: under overload an answer must not wait for other requests' prompts.
        if self._reading >= self.max_waiting or self.worker.full:
            raise ApiError(429, "the queue is full: try again in a second", code="queue_full", retry_after=1)
        loop = asyncio.get_running_loop()
        self._reading += 1
        try:
            request, prompts, found = await loop.run_in_executor(self._readers, self._read, body, kind)
        finally:
            self._reading -= 1
        pictures = None
        if found:
            fetched = sum(place.is_remote for place in found) * self.limits.images.nbytes
            with self._looking.lent(1), self.room.lent(fetched):
                files = await files_of(found, self.limits.images, self.fetcher, self._viewers)
                prompt, pictures = await loop.run_in_executor(self._viewers, self.prompts.seen, request, found, files)
            prompts = [prompt]
            request.messages.clear()  # megabytes of base64, which nobody looks at again
        return await loop.run_in_executor(self._submitters, self._submit, request, prompts, pictures, key)

    def _read(self, body: bytes, kind: type[Common]) -> tuple[Common, list[list[int]], list[Place]]:
        """The request, its prompts, and where it has images: with any, its prompt is not made yet."""
        request = parse_body(body, kind)
        if request.model not in (None, self.name):
            message = f"the model '{request.model[:80]}' is not served here: GET /v1/models lists what is"
            raise ApiError(404, message, param="model", code="model_not_found")
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "'stream_options' needs stream = true", param="stream_options", code="invalid_value")
        wanted = request.n * (len(request.prompts) if isinstance(request, CompletionRequest) else 1)
        if wanted > self.limits.choices:
            message = f"{wanted} choices are asked for, at most {self.limits.choices} are served at once"
            raise ApiError(400, message, param="n", code="invalid_value")
        if isinstance(request, CompletionRequest):
            return request, self.prompts.completion(request), []
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "'top_logprobs' needs logprobs = true", param="top_logprobs", code="invalid_value")
        found = places(request)
        if found:
            check_places(found, request, self.limits.images, self.viewer is not None)
            return request, [], found
        return request, [self.prompts.chat(request)], []

    def _submit(self, request: Common, prompts: list[list[int]], pictures: Pictures | None, key: str) -> Job:
        chat = isinstance(request, ChatRequest)
        job = Job(self, request, ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex)
        seconds = min(request.foveal.deadline or self.limits.deadline, self.limits.deadline)
        deadline = time.monotonic() + seconds
        try:
            for index in range(len(prompts) * request.n):
                which, copy = divmod(index, request.n)
                one = Request(
                    id=f"{job.id}-{index}",
                    prompt_ids=prompts[which],
                    sampling=self._sampling(request, copy),
                    method=request.foveal.method,
                    budget=request.foveal.budget,
                    key=key,
                    deadline=deadline,
                )
                shown = () if pictures is None else (pictures,)
                job.choices.append(Choice(index, which, self.worker.submit(one, *shown)))
        except Exception as error:
            job.cancel()  # the choices before this one
            raise as_api_error(error, "messages" if chat else "prompt") from error
        finally:
            if pictures is not None:  # those who use them have joined
                pictures.leave()
        return job

    def _sampling(self, request: Common, copy: int) -> Sampling:
        if isinstance(request, ChatRequest):
            longest = request.max_completion_tokens or request.max_tokens or self.limits.default_tokens
            top = (request.top_logprobs or 0) if request.logprobs else None
        else:
            longest, top = request.max_tokens, request.logprobs
        return Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            # Choices of one request differ, and each is the same again.
            seed=None if request.seed is None else (request.seed + copy) % 2**63,
            max_tokens=longest,
            stop=request.stops,
            logprobs=top,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
        )

    def token(self, token: int, logprob: float, text: str | None = None) -> dict[str, Any]:
        """One token of `logprobs`; `text` is what it added to the answer, else what it spells by itself."""
        text = self.tokenizer.decode([token]) if text is None else text
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(text.encode("utf-8", "replace"))}


class Job:
    """An accepted request. Read it once, by `whole()` or by `chunks()`; `cancel()` at any time."""

    def __init__(self, api: Api, request: Common, id: str):
        self.api, self.request, self.id = api, request, id
        self.is_chat = isinstance(request, ChatRequest)
        self.created, self.began = int(time.time()), time.monotonic()
        self.choices: list[Choice] = []
        self.failed: ApiError | None = None  # what a stream ended with after its status line had gone out

    def cancel(self) -> None:
        """Free what the choices hold; harmless when they are done."""
        for choice in self.choices:
            choice.stream.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece. Raises ApiError where a choice failed or its time was up."""
        async with aclosing(self._pieces()) as found:
            async for kind, choice, pieces in found:
                for text, entry in pieces if kind != "silence" else []:
                    choice.text += text
                    choice.entries += [] if entry is None else [entry]
        return {**self._head(chunk=False), "choices": [self._choice(c) for c in self.choices], "usage": self.usage()}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, comments where there is silence; ends with [DONE], after an error as well."""
        if self.is_chat:
            for choice in self.choices:
                yield self._chunk(choice.index, {"delta": {"role": "assistant", "content": ""}})
        try:
            async with aclosing(self._pieces(pictures=self.request.foveal.picture)) as pieces:
                async for kind, choice, found in pieces:
                    for chunk in self._chunks_of(kind, choice, found):
                        yield chunk
            if self._include_usage:
                yield self._chunk(None, {}, usage=self.usage())
        except ApiError as error:
            self.failed = error
            yield _event(error.body())
        yield DONE

    def _chunks_of(self, kind: str, choice: Choice | None, found: Any) -> Iterator[bytes]:
        if kind == "silence":
            yield b": still here\n\n"
        elif kind == "picture":
            yield self._chunk(None, {}, foveal={"kept": found, "tokens": choice.tokens, "seen": choice.seen})
        else:
            for text, entry in found:
                yield self._chunk(choice.index, self._delta(text, entry, choice.shown))
                choice.shown += len(text)
            if kind == "end":
                yield self._chunk(choice.index, {"delta": {}} if self.is_chat else {"text": ""}, choice.finish)

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts; `kept_tokens`: keys held at the end, mean over layers and heads, all choices together; `queued_seconds`: the
        longest that a choice waited before its prompt was read."""
        first = [next(c for c in self.choices if c.prompt == p) for p in sorted({c.prompt for c in self.choices})]
        prompt, completion = sum(c.usage.prompt for c in first), sum(c.usage.completion for c in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.usage.cached for c in first)},
            "kept_tokens": sum(c.usage.kept for c in self.choices),
            "queued_seconds": round(max(c.usage.queued for c in self.choices), 4),
        }

    async def _pieces(self, pictures: bool = False) -> AsyncIterator[tuple[str, Choice | None, Any]]:
        """("text" or "end", choice, pieces of text with their logprobs entry), ("picture", choice, matrix), ("silence", None, None)."""
        queue: asyncio.Queue = asyncio.Queue()
        tasks = [asyncio.create_task(self._follow(choice, queue)) for choice in self.choices]
        if pictures:
            tasks.append(asyncio.create_task(self._watch(self.choices[0], queue)))
        left = len(self.choices)
        try:
            while left:
                try:
                    kind, choice, found = await asyncio.wait_for(queue.get(), self.api.limits.ping)
                except TimeoutError:
                    yield "silence", None, None
                    continue
                if kind == "error":
                    raise found
                left -= kind == "end"
                yield kind, choice, found
        finally:
            for task in tasks:
                task.cancel()
            if left:
                self.cancel()
                self.api.metrics.finished.labels("cancelled").inc(sum(c.finish is None for c in self.choices))

    async def _follow(self, choice: Choice, queue: asyncio.Queue) -> None:
        """Events of one choice into the queue. A piece waits for the next event where logprobs are wanted: text held back to the end
        belongs to the last token."""
        metrics, last, held = self.api.metrics, self.began, None
        try:
            async for event in choice.stream:
                now = time.monotonic()
                if event.kind == "error":
                    choice.finish = "error"
                    metrics.finished.labels("error").inc()
                    await queue.put(("error", choice, ApiError(500, _FAILED, code="engine_error")))
                    return
                if event.kind == "token":
                    (metrics.between if choice.tokens else metrics.first_token).observe(now - last)
                    last, choice.tokens = now, choice.tokens + 1
                    metrics.generated_tokens.inc()
                    if event.logprob is None:
                        await queue.put(("text", choice, [(event.text, None)] if event.text else []))
                    else:
                        await queue.put(("text", choice, [] if held is None else [self._entry(held, held.text)]))
                        held = event
                    continue
                self._ended(choice, event, now)
                if choice.finish not in ("stop", "length"):
                    await queue.put(("error", choice, _unfinished(choice.finish)))
                    return
                pieces = (
                    [self._entry(held, held.text + event.text)] if held else [(event.text, None)] if event.text else []
                )
                await queue.put(("end", choice, pieces))
        except Exception as error:  # a reader that dies would leave the client waiting for ever
            failure = ApiError(500, f"the answer could not be read: {type(error).__name__}", code="engine_error")
            await queue.put(("error", choice, failure))

    async def _watch(self, choice: Choice, queue: asyncio.Queue) -> None:
        while True:
            kept = await asyncio.to_thread(self.api.worker.kept, choice.stream.request.id)
            if kept is not None:
                await queue.put(("picture", choice, kept))
            await asyncio.sleep(_PICTURE)

    def _ended(self, choice: Choice, event: Event, now: float) -> None:
        metrics = self.api.metrics
        choice.finish, choice.usage = event.finish, event.usage or Usage()
        metrics.finished.labels(event.finish).inc()
        metrics.queued.observe(choice.usage.queued)
        metrics.whole.observe(now - self.began)
        metrics.prompt_tokens.inc(choice.usage.prompt)
        metrics.cached_tokens.inc(choice.usage.cached)
        # The token that ends a text is generated, and has no event of its own.
        metrics.generated_tokens.inc(max(0, choice.usage.completion - choice.tokens))

    def _entry(self, event: Event, text: str) -> tuple[str, dict[str, Any]]:
        entry = self.api.token(event.token, event.logprob, text)
        entry["top_logprobs"] = [self.api.token(token, logprob) for token, logprob in event.top]
        return text, entry

    @property
    def _include_usage(self) -> bool:
        return self.request.stream_options is not None and self.request.stream_options.include_usage

    def _head(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion" + (".chunk" if chunk else "")) if self.is_chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.api.name}
        return {**head, "system_fingerprint": self.api.fingerprint}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        entries = choice.entries if self._wants_logprobs else None
        if self.is_chat:
            answer = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        else:
            answer = {"text": choice.text}
        return {
            "index": choice.index,
            **answer,
            "logprobs": self._logprobs(entries, 0),
            "finish_reason": choice.finish,
        }

    @property
    def _wants_logprobs(self) -> bool:
        return self.request.logprobs not in (None, False)

    def _delta(self, text: str, entry: dict[str, Any] | None, offset: int) -> dict[str, Any]:
        answer = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return answer if entry is None else {**answer, "logprobs": self._logprobs([entry], offset)}

    def _logprobs(self, entries: list[dict[str, Any]] | None, offset: int) -> dict[str, Any] | None:
        """In the shape of the endpoint; offset: characters of the text before the first entry."""
        if entries is None:
            return None
        if self.is_chat:
            return {"content": entries, "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }

    def _chunk(self, index: int | None, delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        """One event. index None: a chunk with no choices. `usage` is null until the last chunk where it was asked for."""
        choices = [] if index is None else [{"index": index, "logprobs": None, **delta, "finish_reason": finish}]
        usage = {"usage": None} if self._include_usage else {}
        return _event({**self._head(chunk=True), "choices": choices, **usage, **more})


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _unfinished(finish: str | None) -> ApiError:
    if finish == "deadline":
        return ApiError(
            504, "the request took longer than its deadline: ask for fewer tokens", code="deadline_exceeded"
        )
    return ApiError(503, "the request was cancelled: the server is stopping", code="cancelled", retry_after=1)

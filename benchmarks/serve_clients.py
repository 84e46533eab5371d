"""Clients of an OpenAI-compatible server that ask again and again, and what they and the system see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import resource
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

_WORDS = (
    "river",
    "stone",
    "lamp",
    "garden",
    "winter",
    "letter",
    "bridge",
    "cloud",
    "market",
    "violin",
    "harbour",
    "candle",
)


@dataclass
class Load:
    """What clients saw since `begin` (a `time.monotonic()` value), in seconds. `between` holds gaps between chunks with text, which
    are tokens or a few of them; `each` the mean time for a token of every answer. Errors and refusals count from the start."""

    begin: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    errors: Counter = field(default_factory=Counter)
    refused: int = 0
    done: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    chunks: int = 0
    kept: int = 0
    hung_up: int = 0

    def saw(self, times: list[float], now: float, seconds: float) -> None:
        """Note a time, if it ended inside the window."""
        if now >= self.begin:
            times.append(seconds)

    def ended(self, now: float, usage: dict[str, Any] | None, seen: int) -> None:
        """Note an answer that is whole; `seen` chunks of it had text."""
        if now < self.begin:
            return
        usage = usage or {}
        self.done += 1
        self.tokens += usage.get("completion_tokens", seen)
        self.prompt_tokens += usage.get("prompt_tokens", 0)
        self.kept += usage.get("kept_tokens", 0)


def prompt(rng: random.Random, tokens: int) -> str:
    """A text of about so many tokens, unlike any other, and a task whose answer is long."""
    words = " ".join(rng.choice(_WORDS) for _ in range(max(8, tokens - 60)))
    return f"Note {rng.random():.9f}: {words}. Copy this note word by word, and leave nothing out."


async def chunks(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of a stream's events. Raises HTTPStatusError for a status other than 200."""
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


async def ask(client: httpx.AsyncClient, model: str, text: str, answer: int, load: Load) -> None:
    """One request, its numbers added to the load. Waits as it is told where the server is full."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": answer, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began = first = last = time.monotonic()
    seen, usage, finished = 0, None, False
    try:
        async for event in chunks(client, body):
            if "error" in event:
                load.errors["in the stream"] += 1
                return
            usage = event.get("usage") or usage
            choice = (event.get("choices") or [{}])[0]
            finished = finished or choice.get("finish_reason") is not None
            if choice.get("delta", {}).get("content"):
                now = time.monotonic()
                load.saw(load.between if seen else load.first, now, now - last)
                load.chunks += now >= load.begin
                first, last, seen = first if seen else now, now, seen + 1
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 429:
            load.refused += 1
            await asyncio.sleep(min(10, int(error.response.headers.get("retry-after", "1"))) * random.uniform(0.5, 1.5))
        else:
            load.errors[str(error.response.status_code)] += 1
            await asyncio.sleep(0.5)
        return
    except httpx.HTTPError as error:
        load.errors[type(error).__name__] += 1
        await asyncio.sleep(0.5)
        return
    if not finished:
        load.errors["a stream without an end"] += 1
    elif began != first:
        tokens = (usage or {}).get("completion_tokens", seen)
        load.saw(load.each, last, (last - first) / max(1, tokens - 1))
        load.ended(time.monotonic(), usage, seen)


async def drive(
    url: str,
    model: str,
    *,
    clients: int,
    seconds: float,
    lengths: list[int],
    answer: int,
    load: Load | None = None,
    seed: int = 0,
    hang_up: bool = False,
) -> Load:
    """All clients at once until the time is up; requests begun by then are finished, unless the clients `hang_up`."""
    load = load or Load()
    bounds = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=1800, limits=bounds) as client:
        end = time.monotonic() + seconds

        async def one(index: int) -> None:
            rng = random.Random(seed * 1000 + index)
            while time.monotonic() < end:
                await ask(client, model, prompt(rng, rng.choice(lengths)), answer, load)

        tasks = [asyncio.create_task(one(i)) for i in range(clients)]
        if hang_up:
            _, left = await asyncio.wait(tasks, timeout=seconds)
            load.hung_up = len(left)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        else:
            await asyncio.gather(*tasks)
    return load


def summary(load: Load, seconds: float) -> dict[str, Any]:
    """The load as numbers to write down, over a window of so many seconds. Tokens a second are chunks with text, as they come."""
    return {
        "seconds": round(seconds, 1),
        "requests": load.done,
        "requests_per_minute": round(60 * load.done / seconds, 2),
        "refused_429": load.refused,
        "errors": dict(load.errors),
        "tokens_per_second": round(load.chunks / seconds, 2),
        "prompt_tokens_per_second": round(load.prompt_tokens / seconds, 2),
        "first_token_s": quantiles(load.first),
        "between_chunks_s": quantiles(load.between),
        "per_token_s": quantiles(load.each),
        "mean_prompt_tokens": round(load.prompt_tokens / max(1, load.done)),
        "mean_answer_tokens": round(load.tokens / max(1, load.done), 1),
        "mean_kept_tokens": round(load.kept / max(1, load.done)),
    }


def quantiles(values: list[float]) -> dict[str, float] | None:
    """Median and 99th of a hundred; None for none."""
    if len(values) < 2:
        return None
    found = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(statistics.median(values), 4), "p99": round(found[98], 4)}


def metrics(url: str) -> dict[str, float]:
    """A Foveal server's own numbers, name with labels to value; none from another server."""
    text = httpx.get(url + "/metrics", timeout=60).text
    return {m[1]: float(m[2]) for m in re.finditer(r"(?m)^(foveal_\S+) (\S+)$", text)}


def memory(pid: int) -> int:
    """Resident bytes of a process and all below it; 0 where the system does not tell."""
    below: dict[int, list[int]] = defaultdict(list)
    resident: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may end while we look
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            below[parent].append(int(folder.name))
            resident[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * resource.getpagesize()
    total, left = 0, [pid]
    while left:
        one = left.pop()
        total += resident.get(one, 0)
        left += below[one]
    return total

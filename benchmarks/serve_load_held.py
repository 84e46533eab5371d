"""Conversations that a running server really holds at once: more ask than fit, and those that are answered together are counted.

    python -m benchmarks.serve_load_held --out benchmarks/results/serve-held-cpu-DATE.json

For each of dense, 50 % and 25 % a server of its own is started with a small memory for caches. Clients ask it, all at once, to go on with
texts of the same length that no two begin alike and that go round and round, so that hardly an answer ends while anybody looks. The
server lets in whom it has room for. It is full when the first conversation has come `SETTLE` tokens further and nobody new has begun (a
prompt of 1,024 tokens is read in four or five steps) while others wait. `held` are the conversations that were answered within those
tokens; beside it stand what `/metrics` says is running, and how often somebody had to step back. It says nothing of speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .record import save
from .serve_clients import metrics
from .serve_load import ARMS, GIB, command_of, cpu_model, free_port, numbers, served

SETTLE = 16  # tokens of the first conversation during which nobody new begins
MOST = 4096  # tokens an answer may have: more than anybody waits for


@dataclass
class Answers:
    """Chunks with text by conversation, those of the first one since somebody last began, and who was answered within them."""

    chunks: dict[int, int] = field(default_factory=dict)
    ended: int = 0
    since: int = 0
    lately: set[int] = field(default_factory=set)

    def came(self, who: int) -> None:
        """A chunk with text."""
        if who not in self.chunks:
            self.since, self.lately = 0, set()
        self.chunks[who] = self.chunks.get(who, 0) + 1
        self.lately.add(who)
        self.since += who == next(iter(self.chunks))


def prompts(folder: str, count: int, tokens: int) -> list[list[int]]:
    """Token ids of texts that go round and round, so that whoever continues them has no reason to end."""
    from foveal.hub import load_tokenizer

    tokenizer, found = load_tokenizer(folder), []
    for i in range(count):
        rng = random.Random(i)
        line = " ".join(rng.sample(["river", "stone", "lamp", "garden", "winter", "bridge", "cloud", "violin"], 6))
        found.append(
            tokenizer.encode(f"{rng.random():.9f}: " + f"{line}. " * tokens, add_special_tokens=False)[:tokens]
        )
    return found


async def ask(client: httpx.AsyncClient, who: int, prompt: list[int], answers: Answers) -> None:
    """One conversation, until somebody hangs up. Raises for an error or a refusal."""
    body = {"model": "model", "prompt": prompt, "max_tokens": MOST, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {(await answer.aread())[:300]!r}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"an error in the stream: {event}")
                if event["choices"] and event["choices"][0]["text"]:
                    answers.came(who)
    answers.ended += 1


async def fill(url: str, prompts: list[list[int]], settle: int = SETTLE, seconds: float = 600.0) -> dict[str, Any]:
    """Ask with all prompts at once and say how many the server held when it was full. Raises RuntimeError where it was not
    within so many seconds, because everybody had room, or where a request failed."""
    answers, began, rows = Answers(), time.monotonic(), []
    bounds = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(base_url=url, timeout=seconds, limits=bounds) as client:
        tasks = [asyncio.create_task(ask(client, i, prompt, answers)) for i, prompt in enumerate(prompts)]
        try:
            while answers.since < settle:
                done, _ = await asyncio.wait(tasks, timeout=0.25, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                if len(answers.chunks) == len(prompts) or time.monotonic() - began > seconds:
                    raise RuntimeError(f"not full with {len(answers.chunks)} of {len(prompts)} conversations")
                rows.append(await asyncio.to_thread(metrics, url))
            now = await asyncio.to_thread(metrics, url)
            held = len(answers.lately)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "held": held,
        "running": int(now["foveal_requests_running"]),
        "waiting": int(now["foveal_requests_waiting"]),
        "most_running": int(max(row["foveal_requests_running"] for row in [*rows, now])),
        "stepped_back": int(now["foveal_preemptions_total"]),
        "ended": answers.ended,
        "kv_bytes": now['foveal_kv_bytes{kind="allocated"}'],
        "most_kv_bytes": max(row['foveal_kv_bytes{kind="allocated"}'] for row in [*rows, now]),
        "dense_bytes": now['foveal_kv_bytes{kind="dense_equivalent"}'],
        "answered_tokens": {"first": max(answers.chunks.values()), "last": min(answers.chunks.values())},
        "seconds": round(time.monotonic() - began, 1),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Fill a server of every share; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="dense,half,quarter", type=lambda text: text.split(","))
    parser.add_argument("--model", default=None, help="a folder with safetensors; default: the default model's")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--memory", type=float, default=0.5, help="GiB of cache")
    parser.add_argument("--clients", type=int, default=64, help="conversations that ask: more than fit")
    parser.add_argument("--method", default="streaming-llm", help="what lets keys go below the whole budget")
    parser.add_argument("--threads", type=int, default=2, help="of the server")
    parser.add_argument("--server-cores", type=numbers, default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    from foveal.default_model import default_folder

    folder = str(options.model or default_folder())
    texts = prompts(folder, options.clients, options.tokens)
    shown = ("tokens", "memory", "clients", "method", "threads", "device")
    settings = {name: getattr(options, name) for name in shown} | {"settle": SETTLE, "model": Path(folder).name}
    result = {"cpu_model": cpu_model(), "cores": len(options.server_cores) or os.cpu_count(), "settings": settings}
    result["servers"] = {}
    for arm in options.arms:
        port = free_port()
        command = [*command_of(arm, folder, port, options), "--max-running", str(options.clients)]
        with served(command, port, options):
            row = asyncio.run(fill(f"http://127.0.0.1:{port}", texts))
        result["servers"][arm] = {"budget": ARMS[arm], **row, "share_of_memory": row["kv_bytes"] / options.memory / GIB}
        print(arm, json.dumps(result["servers"][arm]), flush=True)
        save(options.out, result)
    return result


if __name__ == "__main__":
    main()

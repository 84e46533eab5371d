"""Load on a server: 64 clients with prompts of mixed lengths, for dense and smaller budgets, beside `transformers serve`.

    python -m benchmarks.serve_load run dense --seconds 600 --out dense.json          # half, quarter, transformers, transformers-plain
    python -m benchmarks.serve_load gather dense.json half.json ... --out benchmarks/results/serve-load-cpu-DATE.json

`run` starts one server with a model from a local folder, loads it, and stops it; several may run side by side, each on cores of its own
(`--server-cores 0,1 --client-cores 8`). Clients ask, read the stream to its end, and ask again; a 429 is waited out as its Retry-After
says. Counted is what ends inside the window after the warm-up: throughput, time to the first token and between tokens (median and
99th of a hundred), errors by kind, memory of the server's processes over time. At the window's end clients hang up, and a Foveal
server must come back to no requests and no bytes; then one conversation of the mean length is held alone, and its bytes say how many fit
into the cache. The file is written every few seconds, so a run that is cut short is not lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .serve_clients import Load, ask, drive, memory, metrics, prompt, summary

GIB = 2**30
ASKED = 48  # tokens that the conversation held alone asks for
BLOCK = 256  # tokens of a block of `transformers serve`, its default
SAMPLE = 5.0  # seconds between two looks at the server
FLAT = 0.05  # growth of memory from the middle third of a window to its last that counts as none
ARMS = {
    "dense": 1.0,
    "half": 0.5,
    "quarter": 0.25,
    "transformers": "--continuous-batching",
    "transformers-plain": "",
}


@dataclass
class Watch:
    """Looks at a server while it is loaded: seconds into the window, resident bytes, cache bytes, requests that run and that wait."""

    url: str
    pid: int
    begin: float
    rows: list[list[float]] = field(default_factory=list)
    foveal: bool = True

    def look(self) -> None:
        """One row; a server that does not answer in time has none."""
        with contextlib.suppress(httpx.HTTPError):
            own = metrics(self.url) if self.foveal else {}
            names = ('kv_bytes{kind="allocated"}', "requests_running", "requests_waiting")
            found = [own.get(f"foveal_{name}", 0.0) for name in names]
            self.rows.append([round(time.monotonic() - self.begin, 1), memory(self.pid), *found])

    def found(self) -> dict[str, Any]:
        """Memory over the thirds of the window, whether it is flat, the most of everything, and the rows."""
        seen = [row for row in self.rows if row[0] >= 0]
        if len(seen) < 3:
            return {"timeline": self.rows}
        third = len(seen) // 3
        parts = [round(statistics.median(row[1] for row in seen[i * third : (i + 1) * third])) for i in range(3)]
        most = {
            "running": max(r[3] for r in seen),
            "waiting": max(r[4] for r in seen),
            "kv_bytes": max(r[2] for r in seen),
        }
        growth = parts[2] / parts[1] - 1 if parts[1] else 0.0
        resident = {"thirds": parts, "growth": round(growth, 4), "flat": growth <= FLAT}
        columns = ["seconds", "resident_bytes", "kv_bytes", "running", "waiting"]
        timeline = {name: [row[i] for row in self.rows[::4]] for i, name in enumerate(columns)}
        return {"resident_bytes": resident, "most": most if self.foveal else {}, "timeline": timeline}


def measure(url: str, model: str, pid: int, options: argparse.Namespace, write=lambda row: None) -> dict[str, Any]:
    """Warm up and load the server whose process is `pid`; `write` gets what is known so far, every few seconds."""
    begin = time.monotonic() + options.warmup
    load, watch = Load(begin), Watch(url, pid, begin, foveal=options.foveal)
    given = {"clients": options.clients, "lengths": options.lengths, "answer": options.answer, "load": load}

    def row(seconds: float) -> dict[str, Any]:
        return {**summary(load, seconds), "hung_up_at_the_end": load.hung_up, **watch.found()}

    async def work() -> None:
        task = asyncio.create_task(drive(url, model, seconds=options.warmup + options.seconds, hang_up=True, **given))
        while not task.done():
            await asyncio.wait([task], timeout=options.sample)
            if not task.done():
                await asyncio.to_thread(watch.look)
                write(row(max(1.0, time.monotonic() - begin)))
        await task

    asyncio.run(work())
    return row(options.seconds)


def of_foveal(url: str, words: int, cache: int, most: float = 60.0) -> dict[str, Any]:
    """What only a Foveal server tells: whether it comes back to nothing once clients have hung up (within `most` seconds), and
    conversations of so many words that fit into `cache` bytes, by what one holds while it is answered and while its prompt is read (a
    server lets in fewer, for it keeps room for further tokens of each: `serve_load_held` counts them)."""
    began = time.monotonic()
    while any(busy := _busy(metrics(url))) and time.monotonic() - began < most:
        time.sleep(0.02)
    idle = {
        "seconds_to_idle": round(time.monotonic() - began, 2),
        "kv_bytes_when_idle": busy[2],
        "back_to_zero": not any(busy),
    }
    name = httpx.get(url + "/v1/models", timeout=60).json()["data"][0]["id"]
    tokens, reading, held = asyncio.run(_one_conversation(url, name, prompt(random.Random(7), words)))
    now = metrics(url)
    # A sixteenth is never given away, and one is read while the others are held.
    fit = 1 + (cache * 15 / 16 - reading) / held if held else None
    return idle | {
        "preemptions": now["foveal_preemptions_total"],
        "generations": {k.split('"')[1]: int(v) for k, v in now.items() if k.startswith("foveal_generations_total{")},
        "conversation_tokens": tokens,
        "bytes_while_read": reading,
        "bytes_held": held,
        "conversations_in_cache": None if fit is None else int(fit),
    }


def _busy(now: dict[str, float]) -> tuple[float, float, float]:
    return (now["foveal_requests_running"], now["foveal_requests_waiting"], now['foveal_kv_bytes{kind="allocated"}'])


async def _one_conversation(url: str, name: str, text: str) -> tuple[int, float, float]:
    """Tokens of one request alone, the most bytes in use until its first token, and the most from some tokens later on."""
    reading = held = 0.0
    load = Load()
    async with httpx.AsyncClient(base_url=url, timeout=900) as client:
        task = asyncio.create_task(ask(client, name, text, ASKED, load))
        while not task.done():
            await asyncio.sleep(0.01)
            answered = len(load.between) > 2
            used = (await asyncio.to_thread(metrics, url))['foveal_kv_bytes{kind="allocated"}']
            if answered:
                held = max(held, used)
            elif not load.first:
                reading = max(reading, used)
    return load.prompt_tokens + load.tokens, max(reading, held), held


@contextlib.contextmanager
def served(command: list[str], port: int, options: argparse.Namespace) -> Iterator[subprocess.Popen]:
    """A server's process on cores of its own, from when /health answers until the block ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    said = options.out.with_suffix(".log").open("wb")
    process = subprocess.Popen(
        command, stdout=said, stderr=said, env=environment, preexec_fn=lambda: pin(options.server_cores)
    )
    try:
        end = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start; {said.name} says why")
            time.sleep(0.5)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pin(cores: list[int]) -> None:
    """Keep this process to some cores; none means all."""
    if cores:
        os.sched_setaffinity(0, cores)


def command_of(arm: str, folder: str, port: int, options: argparse.Namespace) -> list[str]:
    """How a server is started. `transformers serve` gets as many blocks of cache as fit the same memory."""
    if isinstance(ARMS[arm], float):
        command = [sys.executable, "-m", "foveal.cli", "serve", folder, "--port", str(port), "--name", "model"]
        command += [
            "--deadline",
            "3600",
            "--device",
            options.device,
            "--memory",
            str(options.memory),
            "--max-waiting",
            str(options.clients),
        ]
        return command + ([] if ARMS[arm] == 1.0 else ["--method", options.method, "--budget", str(ARMS[arm])])
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", folder]
    command += ["--port", str(port), "--host", "127.0.0.1", "--device", options.device]
    command += ["--dtype", "float32" if options.device == "cpu" else "bfloat16"]
    if ARMS[arm]:
        command += [ARMS[arm], "--cb-num-blocks", str(blocks_of(folder, options))]
        command += ["--cb-max-batch-tokens", str(options.batch_tokens)]
    return command


def blocks_of(folder: str, options: argparse.Namespace) -> int:
    """Blocks of `transformers serve` that fit the memory for caches."""
    shape = json.loads((Path(folder) / "config.json").read_text())
    heads = shape["num_attention_heads"]
    width = shape.get("num_key_value_heads", heads) * (shape.get("head_dim") or shape["hidden_size"] // heads)
    token = 2 * shape["num_hidden_layers"] * width * (4 if options.device == "cpu" else 2)
    return int(options.memory * GIB / (BLOCK * token))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load one server and write what came of it."""
    from benchmarks.record import meta
    from foveal.default_model import default_folder

    pin(options.client_cores)
    folder, port = str(options.model or default_folder()), free_port()
    options.foveal = options.arm in ("dense", "half", "quarter")
    hidden = ("out", "model", "work", "arm", "foveal", "server_cores", "client_cores")
    settings = {k: v for k, v in vars(options).items() if k not in hidden}
    settings["cores"] = len(options.server_cores) or os.cpu_count()
    result = {"meta": meta() | {"cpu_model": cpu_model()}, "arm": options.arm, "settings": settings, "complete": False}

    def write(row: dict[str, Any], complete: bool = False) -> None:
        result.update(row=row, complete=complete)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        half = options.out.with_suffix(".part")
        half.write_text(json.dumps(result, indent=1) + "\n")
        half.replace(options.out)

    write({})
    command = command_of(options.arm, folder, port, options)
    with served(command, port, options) as process:
        url = f"http://127.0.0.1:{port}"
        row = measure(url, "model" if options.foveal else folder, process.pid, options, write)
        write(row)
        if options.foveal:
            row |= of_foveal(url, round(statistics.mean(options.lengths)), int(options.memory * GIB))
        elif ARMS[options.arm]:
            tokens = round(statistics.mean(options.lengths)) + ASKED
            row["conversations_in_cache"] = blocks_of(folder, options) // math.ceil(tokens / BLOCK)
    row["exit_code"] = process.returncode
    write(row, complete=True)
    print(options.arm, json.dumps({k: v for k, v in row.items() if k != "timeline"}))
    return result


def cpu_model() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return "unknown"


def gather(options: argparse.Namespace) -> dict[str, Any]:
    """One file of several runs. Raises SystemExit where their settings differ."""
    runs = [json.loads(path.read_text()) for path in options.files]
    settings = runs[0]["settings"]
    if any(run["settings"] != settings for run in runs):
        raise SystemExit("expected runs of the same settings: run them again alike")
    result = {"meta": runs[0]["meta"], "settings": settings, "servers": {}}
    for run in sorted(runs, key=lambda run: list(ARMS).index(run["arm"])):
        result["servers"][run["arm"]] = run["row"] | {"complete": run["complete"], "versions": run["meta"]["versions"]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out}")
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run one arm or gather several; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = parser.add_subparsers(dest="work", required=True)
    one = works.add_parser("run", help="load one server")
    one.add_argument("arm", choices=list(ARMS))
    one.add_argument("--model", default=None, help="a folder with safetensors; default: the default model's")
    one.add_argument("--seconds", type=float, default=600.0)
    one.add_argument("--warmup", type=float, default=60.0, help="seconds before the measurement")
    one.add_argument("--sample", type=float, default=SAMPLE, help="seconds between two looks at the server")
    one.add_argument("--clients", type=int, default=64)
    one.add_argument("--lengths", type=numbers, default=[256, 512, 1024, 2048, 4096])
    one.add_argument("--answer", type=int, default=128, help="most tokens of an answer")
    one.add_argument("--method", default="streaming-llm", help="what lets keys go below the whole budget")
    one.add_argument("--memory", type=float, default=2.0, help="GiB of cache")
    one.add_argument("--batch-tokens", type=int, default=512, help="tokens of a batch of transformers serve")
    one.add_argument("--threads", type=int, default=2, help="of the server")
    one.add_argument("--server-cores", type=numbers, default=[])
    one.add_argument("--client-cores", type=numbers, default=[])
    one.add_argument("--device", default="cpu")
    several = works.add_parser("gather", help="one file of several runs")
    several.add_argument("files", type=Path, nargs="+")
    for work in (one, several):
        work.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    return run(options) if options.work == "run" else gather(options)


def numbers(text: str) -> list[int]:
    """Whole numbers with commas."""
    return [int(word) for word in text.split(",") if word]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


if __name__ == "__main__":
    main()

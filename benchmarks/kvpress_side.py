"""Foveal beside NVIDIA's kvpress: the same model, prompts, answers' scoring and machine, for the methods that both have.

kvpress pins an older transformers, so it has an environment of its own and this file runs in both:

    python -m benchmarks.kvpress_side ask --work side                       # Foveal's: writes the prompts, answers them
    KVPRESS_ENV/bin/python -m benchmarks.kvpress_side press --work side     # kvpress's: answers the same prompts
    python -m benchmarks.kvpress_side table --work side                     # scores both; writes benchmarks/results/kvpress-<date>.json

The context is read and compressed before the question is known, one sequence at a time; answers are greedy. Budgets are shares of
the context. Settings are made equal: SnapKV with 32 observing queries and average pooling over 7, random without protected keys.
Tasks are those of `foveal compare`, "ruler" the eleven that need no data, each with answers as long as it asks for.
Scores, bytes and peaks are of `--workers` processes, dealt out over the GPUs; seconds are of one process alone that comes after them.
Every answer is written down as it comes, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

TASKS, LENGTHS, SAMPLES = ("ruler",), (2048, 4096), 10
SNAP = {"window": 32, "kernel": 7}
NAMES = ("dense", "streaming-llm", "random-keep", "snapkv", "ada-kv")
TIMED, STEPS = 4, 64  # prompts of each length, and tokens after each question, that seconds are measured on
One = Callable[[str, float, dict, bool], dict]


def ours(name: str, budget: float) -> str:
    """A method of NAMES in Foveal's text form."""
    snap = f"window={SNAP['window']}, kernel={SNAP['kernel']}, pooling='avg'"
    return {
        "streaming-llm": f"streaming-llm(budget={budget})",
        "random-keep": f"random-keep(budget={budget}, sink=0, recent=0)",
        "snapkv": f"snapkv(budget={budget}, {snap})",
        "ada-kv": f'ada-kv(budget={budget}, scorer="snapkv({snap})")',
    }[name]


def theirs(name: str, budget: float):
    """The same as a press of kvpress."""
    import kvpress

    ratio = 1 - budget
    snap = kvpress.SnapKVPress(compression_ratio=ratio, window_size=SNAP["window"], kernel_size=SNAP["kernel"])
    return {
        "streaming-llm": lambda: kvpress.StreamingLLMPress(compression_ratio=ratio, n_sink=4),
        "random-keep": lambda: kvpress.RandomPress(compression_ratio=ratio, seed=0),
        "snapkv": lambda: snap,
        "ada-kv": lambda: kvpress.AdaKVPress(snap, alpha_safeguard=0.2),
    }[name]()


def plan(budgets: list[float]) -> list[tuple[str, float]]:
    return [("dense", 1.0), *((name, b) for name in NAMES[1:] for b in budgets)]


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------------- Foveal's side


def ask(options: argparse.Namespace) -> None:
    """Write the prompts, unless they are there, and answer them."""
    import foveal

    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "prompts.json"
    if not file.exists():
        write_prompts(options)
    head, asked = json.loads(file.read_text("utf-8")), ("lengths", "samples", "tasks", "budgets")
    if other := [f"{k} {head[k]}" for k in asked if head[k] != getattr(options, k)]:
        sys.exit(f"{options.work} holds prompts with {', '.join(other)}: say the same, or name another --work")
    run("foveal", options.work, options.workers, {"foveal": foveal.__version__})


def write_prompts(options: argparse.Namespace) -> None:
    import foveal
    from foveal.compare.plan import expanded
    from foveal.default_model import default_folder
    from foveal.tasks import get_task

    model, tokenizer = foveal.load(options.model, device=options.device)
    prompts, tasks = [], [get_task(name) for name in expanded([], options.tasks)[1]]
    for task, length in ((t, n) for n in options.lengths for t in tasks):
        for s in task.samples(tokenizer, length, options.samples):
            told = {k: getattr(s, k) for k in ("context", "question", "target", "length", "depth", "index", "seed")}
            prompts.append({"task": task.name, "answer": task.max_new_tokens, **told})
    head = {
        "model": options.model or str(default_folder()),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    head |= {k: getattr(options, k) for k in ("lengths", "samples", "budgets", "tasks")}
    (options.work / "prompts.json").write_text(json.dumps(head | {"prompts": prompts}), "utf-8")


def foveal_side(head: dict, device: str) -> One:
    """How Foveal answers a prompt."""
    import foveal
    from foveal.compare.drive import answer
    from foveal.compare.measure import Memory

    model, tokenizer = foveal.load(head["model"], device=device, dtype=head["dtype"])
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}

    def one(name: str, budget: float, p: dict, timed: bool) -> dict:
        method = None if name == "dense" else ours(name, budget)
        with torch.no_grad(), foveal.attach(model, method), Memory(model.device) as memory:
            start = now(model.device)
            store = model(torch.tensor([p["context"]], device=model.device), logits_to_keep=1).past_key_values
            read = now(model.device)
            held = store.nbytes
            most, until = (STEPS, set()) if timed else (p["answer"], stops)
            (ids,) = answer(model, store, [tuple(p["question"])], most, until)
            end = now(model.device)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return told(text, held, memory.peak, read - start, end - read)

    return one


# ---------------------------------------------------------------------- kvpress's side


def press(options: argparse.Namespace) -> None:
    """Answer the prompts that `ask` wrote, with kvpress's own code."""
    from importlib.metadata import version

    run("kvpress", options.work, options.workers, {"kvpress": version("kvpress")})


def kvpress_side(head: dict, device: str) -> One:
    """How kvpress answers a prompt."""
    for module, name in (
        ("datasets", "load_dataset"),
        ("fire", "Fire"),
        ("requests", "get"),
    ):  # for what is not used here
        try:
            __import__(module)
        except ImportError:
            sys.modules[module] = types.ModuleType(module)
            setattr(sys.modules[module], name, None)
    from kvpress.pipeline import KVPressTextGenerationPipeline
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(head["model"])
    dtype = getattr(torch, head["dtype"])
    model = AutoModelForCausalLM.from_pretrained(head["model"], dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device=model.device)
    stops = model.generation_config.eos_token_id

    def one(name: str, budget: float, p: dict, timed: bool) -> dict:
        how = contextlib.nullcontext() if name == "dense" else theirs(name, budget)(model)
        context = torch.tensor([p["context"]], device=model.device)
        question = torch.tensor([p["question"]], device=model.device)
        cache, peak = DynamicCache(), Peak(model.device)
        model.generation_config.eos_token_id = -1 if timed else stops
        for layer in model.model.layers:  # what AdaKVPress hid for the last prompt lives on the layers
            layer.self_attn.masked_key_indices = None
        with torch.no_grad(), peak:
            start = now(model.device)
            with how:
                model.model(input_ids=context, past_key_values=cache)
            read = now(model.device)
            tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
            held = sum(x.untyped_storage().nbytes() for x in tensors)
            text = pipe.generate_answer(question, cache, context.shape[1], STEPS if timed else p["answer"])
            end = now(model.device)
        return told(text, held, peak.peak, read - start, end - read)

    return one


class Peak:
    """Peak memory, as `foveal.compare.measure.Memory` has it: of the process on a CPU, of the allocator on a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, 0

    def __enter__(self):
        import ctypes
        import gc
        import threading

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.stop = threading.Event()
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()
        return self

    def _watch(self):
        page = 4096
        while True:
            self.peak = max(self.peak, int(Path("/proc/self/statm").read_text().split()[1]) * page)
            if self.stop.wait(0.02):
                return

    def __exit__(self, *exc):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.stop.set()
            self.watch.join()


# ---------------------------------------------------------------------- both


def told(text: str, held: int, peak: int, read_s: float, answer_s: float) -> dict:
    return {"text": text, "bytes": held, "peak_bytes": peak, "read_s": read_s, "answer_s": answer_s}


def run(side: str, work: Path, workers: int, versions: dict) -> None:
    """Every method on every prompt by `workers` processes; then seconds, by one alone."""
    import transformers

    prompts_of(work)
    versions |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    (work / f"{side}.json").write_text(json.dumps(versions), "utf-8")
    context = multiprocessing.get_context("spawn")
    for timed, count in ((False, workers), (True, 1)):
        crew = [context.Process(target=answer_share, args=(side, work, i, count, timed)) for i in range(count)]
        for process in crew:
            process.start()
        for process in crew:
            process.join()
        if any(process.exitcode for process in crew):
            sys.exit(f"{side}: a process failed; the same command goes on with what is left")


def answer_share(side: str, work: Path, i: int, count: int, timed: bool) -> None:
    """Every `count`-th prompt from number i, prompt by prompt, so that a busy machine slows all methods alike."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    head = prompts_of(work)
    device = head["device"] if head["device"] == "cpu" else f"cuda:{i % torch.cuda.device_count()}"
    if device != "cpu":
        torch.cuda.set_device(device)
    known = {(a["method"], a["budget"], a["prompt"]) for a in answers(side, work, timed)}
    mine = [n for n in range(len(head["prompts"])) if n % count == i]
    if timed:
        lengths = [p["length"] for p in head["prompts"]]
        mine = [n for n in mine if lengths[:n].count(lengths[n]) < TIMED]
    todo = [(n, *c) for n in mine for c in plan(head["budgets"]) if (*c, n) not in known]
    if not todo:
        return
    one = {"foveal": foveal_side, "kvpress": kvpress_side}[side](head, device)
    for name, budget in plan(head["budgets"]):  # once for warmth; what fails says so below
        with contextlib.suppress(Exception):
            one(name, budget, head["prompts"][todo[0][0]], timed)
    with (work / f"{side}.{'timed' if timed else 'answers'}.{i}.jsonl").open("a", encoding="utf-8") as file:
        if file.tell():
            file.write("\n")  # after a line that may have been cut off
        for n, name, budget in todo:
            try:
                got = one(name, budget, head["prompts"][n], timed)
            except Exception as error:
                got = {"error": f"{type(error).__name__}: {error}"}
            file.write(json.dumps({"method": name, "budget": budget, "prompt": n} | got) + "\n")
            file.flush()
            if name == NAMES[-1] and budget == head["budgets"][-1]:
                print(f"{side}{' timed' if timed else ''}: prompt {n + 1} of {len(head['prompts'])}", file=sys.stderr)


def prompts_of(work: Path) -> dict:
    """What `ask` wrote."""
    try:
        return json.loads((work / "prompts.json").read_text("utf-8"))
    except FileNotFoundError:
        sys.exit(f"{work} holds no prompts yet: run `ask --work {work}` first")


def answers(side: str, work: Path, timed: bool) -> list[dict]:
    """What was written so far; a last line that was cut off is left out."""
    found = []
    for file in sorted(work.glob(f"{side}.{'timed' if timed else 'answers'}.*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def table(options: argparse.Namespace) -> None:
    """Score both sides, print a table and write the results."""
    from foveal.compare.measure import hardware
    from foveal.stats import bootstrap, paired_bootstrap
    from foveal.tasks import Sample, get_task

    head = prompts_of(options.work)
    sides = ("foveal", "kvpress")
    prompts = head["prompts"]
    tasks = {name: get_task(name) for name in dict.fromkeys(p["task"] for p in prompts)}
    key = lambda a: (a["method"], a["budget"], prompts[a["prompt"]]["length"])
    found = {side: {} for side in sides}
    for side in sides:
        for a in answers(side, options.work, timed=False):
            found[side].setdefault(key(a), {})[a["prompt"]] = a
    seconds = {side: answers(side, options.work, timed=True) for side in sides}
    lengths = [n for n in head["lengths"] if all(("dense", 1.0, n) in found[side] for side in sides)]
    if not lengths:
        sys.exit(f"{options.work} has no length that both sides answered yet: run the other steps first")

    def score(a: dict) -> float:
        p = prompts[a["prompt"]]
        gold = p["target"] if isinstance(p["target"], str) else tuple(p["target"])
        sample = Sample(tuple(p["context"]), tuple(p["question"]), gold, p["length"], p["depth"], p["index"], p["seed"])
        return tasks[p["task"]].score(sample, a["text"])

    rows, failed = [], []
    for length, config in ((n, c) for n in lengths for c in plan(head["budgets"])):
        asked = {side: found[side].get((*config, length), {}) for side in sides}
        for side in sides:
            errors = [a["error"] for a in asked[side].values() if "error" in a]
            failed += [[side, *config, f"{len(errors)} of {len(asked[side])} prompts: {errors[0]}"]] if errors else []
            asked[side] = {n: a for n, a in asked[side].items() if "error" not in a}
        good = [side for side in sides if asked[side]]
        both = sorted(set.intersection(*(set(asked[side]) for side in good))) if good else []
        scores = {side: [score(asked[side][n]) for n in both] for side in good}
        for side in good if both else ():
            over = side == "foveal" and len(good) == 2
            quiet = [a for a in seconds[side] if key(a) == (*config, length) and "error" not in a]
            plain = [found["kvpress"]["dense", 1.0, length][n] for n in both]
            rows.append(
                {
                    "method": config[0],
                    "budget": config[1],
                    "length": length,
                    "side": side,
                    "score": bootstrap(scores[side], bounds=(0, 1))._asdict(),
                    "over_kvpress": paired_bootstrap(*scores.values(), bounds=(-1, 1))._asdict() if over else None,
                }
                | costs([asked[side][n] for n in both], plain, quiet)
            )
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    meta = {"date": date, "model": Path(head["model"]).name, "device": head["device"], "dtype": head["dtype"]}
    meta |= {k: head[k] for k in ("lengths", "samples", "budgets")}
    meta |= {
        "tasks": list(tasks),
        "timed": {"prompts": TIMED, "tokens": STEPS},
        "hardware": hardware(torch.device(head["device"])),
        "versions": {side: json.loads((options.work / f"{side}.json").read_text("utf-8")) for side in sides},
        "failed": failed,
    }
    out = options.results / f"kvpress-{date}.json"
    lines = ",\n".join("  " + json.dumps(rounded(r)) for r in rows)
    out.write_text(f'{{\n "meta": {json.dumps(meta)},\n "rows": [\n{lines}\n ]\n}}\n', "utf-8")
    print(json.dumps(rows, indent=1), *(f"failed: {f}" for f in failed), f"wrote {out}", sep="\n")


def costs(mine: list[dict], plain: list[dict], quiet: list[dict]) -> dict:
    """Bytes and peaks of a method's answers beside the dense ones to the same prompts, and seconds of the `quiet` ones."""
    return {
        "bytes_of_dense": statistics.fmean(a["bytes"] / b["bytes"] for a, b in zip(mine, plain, strict=True)),
        "peak_mb": statistics.median(a["peak_bytes"] for a in mine) / 1e6,
        "read_s": statistics.median(a["read_s"] for a in quiet) if quiet else None,
        "token_ms": 1e3 * statistics.median(a["answer_s"] / STEPS for a in quiet) if quiet else None,
    }


def rounded(x):
    """Numbers with four digits, as a table needs them."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return float(f"{x:.4g}") if isinstance(x, float) else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("ask", "press", "table"))
    parser.add_argument("--work", type=Path, required=True, help="folder of prompts and answers")
    parser.add_argument("--workers", type=int, default=1, help="processes, dealt out over the GPUs")
    parser.add_argument("--model", default=None, help="a local folder; default: the default model")
    parser.add_argument("--device", default=None)
    parser.add_argument("--lengths", type=lambda t: [int(n) for n in t.split(",")], default=list(LENGTHS))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each task at each length")
    parser.add_argument("--tasks", type=lambda t: t.split(","), default=list(TASKS))
    parser.add_argument("--budgets", type=lambda t: [float(b) for b in t.split(",")], default=[0.5, 0.25, 0.125])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    {"ask": ask, "press": press, "table": table}[options.step](options)


if __name__ == "__main__":
    main()

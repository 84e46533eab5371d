"""Decode and prefill on a CPU against dense SDPA in the same run: `python -m benchmarks.cpu_decode [--length 4096]`.

Every method reads the same text; then all of them decode in turns, one step each, so that a busy machine slows all alike.
Reported are medians and the ratio to stock transformers (SDPA with its DynamicCache, same process, same tokens). Writes
benchmarks/results/cpu-decode-<date>.json.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

import foveal
from foveal.compare.measure import hardware
from foveal.data import book

METHODS = [
    "dense",
    None,
    "streaming-llm(budget=0.25)",
    "h2o(budget=0.25)",
    "scissorhands(budget=0.25)",
    "razor(budget=0.25)",
    "duo(budget=0.25)",
    "quest(budget=0.25)",
    "top-k(budget=0.25)",
    "zero-tuning(gamma=2.0)",
]


def prefill(model, method, ids):
    start = time.perf_counter()
    if method == "dense":
        cache = model(ids, logits_to_keep=1).past_key_values
    else:
        with foveal.attach(model, method):
            cache = model(ids, logits_to_keep=1).past_key_values
    return cache, time.perf_counter() - start


def step(model, method, cache, token):
    if method == "dense":
        start = time.perf_counter()
        model(token, past_key_values=cache)
        return time.perf_counter() - start
    with foveal.attach(model, method):
        start = time.perf_counter()
        model(token, past_key_values=cache)
        return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--methods", nargs="*", help="specifications; default: the built-in list")
    parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    model, tokenizer = foveal.load(device="cpu")
    ids = tokenizer(book()[100_000:400_000], return_tensors="pt").input_ids[:, : args.length + args.steps + 3]
    methods = [None if m == "none" else m for m in args.methods] if args.methods else METHODS
    methods = ["dense", *[m for m in methods if m != "dense"]]
    prefill(model, "dense", ids[:, :256])
    caches, reading, decoding = {}, {}, {m: [] for m in methods}
    for m in methods:
        caches[m], reading[m] = prefill(model, m, ids[:, : args.length])
        print(f"read {args.length} tokens with {m or 'no method'}: {reading[m]:.1f} s", file=sys.stderr)
    for t in range(args.steps + 3):
        token = ids[:, args.length + t : args.length + t + 1]
        for m in methods:
            decoding[m].append(step(model, m, caches[m], token))
    records = []
    for m in methods:
        times = decoding[m][3:]
        ratios = [d / x for d, x in zip(decoding["dense"][3:], times, strict=True)]
        stock = m == "dense"
        dense_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches["dense"].layers)
        records.append({
            "method": "transformers sdpa" if stock else m or "attached, no method",
            "decode_ms": 1e3 * statistics.median(times),
            "decode_vs_dense": statistics.median(ratios),
            "prefill_s": reading[m],
            "prefill_vs_dense": reading[m] / reading["dense"],
            "kv_share": 1.0 if stock else caches[m].nbytes / dense_bytes,
        })  # fmt: skip
    print(f"{'method':32} {'ms/token':>9} {'x dense':>8} {'prefill s':>10} {'x dense':>8} {'bytes':>7}")
    for r in records:
        print(
            f"{r['method']:32} {r['decode_ms']:9.1f} {r['decode_vs_dense']:8.2f} {r['prefill_s']:10.1f} {r['prefill_vs_dense']:8.2f} "
            f"{r['kv_share']:7.1%}"
        )
    today = datetime.date.today().isoformat()
    meta = {
        "command": "python -m benchmarks.cpu_decode " + " ".join(sys.argv[1:]),
        "date": today,
        "model": model.name_or_path,
        "length": args.length,
        "steps": args.steps,
        "hardware": hardware(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {
            "foveal": foveal.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    out = Path(args.out) / f"cpu-decode-{today}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

"""What methods that keep or read less are worth on a Llama-3-8B-shaped model.

    python -m benchmarks.keep [--out benchmarks/results/keep-h100-DATE.json] [--lengths 32768,131072] [--seconds 140]

For each method and length: milliseconds of a decode step (a captured graph), resident bytes after the prompt, and how much longer than
dense the prompt takes to read. Dense decode is PyTorch's fused attention on a contiguous cache, graphed too; the dense prompt is read by
the same session without a method. Weights, prompts and head roles are random: this is cost, not quality. What a method leaves of a
prompt comes from its own hooks on random keys in all 32 layers; reading is timed on two layers at full width, which all methods share.
`--tiny` tries the command on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import foveal
from foveal import ops
from foveal.heads import HeadRoles
from foveal.hub import model_identity
from foveal.method import iterate
from foveal.ops.ragged import Logit
from foveal.parts import let_go
from foveal.step import Pass, Step

from .decode import Dense, _median
from .llama import llama_8b
from .record import save

ARMS = (
    "streaming-llm(budget=1024)",
    "streaming-llm(budget=4096)",
    "duo(roles='{roles}')",
    "duo(whole=0.25, roles='{roles}')",
    "razor(roles='{roles}')",
    "razor(budget=0.3, roles='{roles}')",
    "scissorhands(budget=0.2)",
    "scissorhands(budget=0.2, bits=4)",
    "h2o(budget=0.2)",
    "snapkv(budget=1024)",
    "ada-kv(budget=1024)",
    "compress-kv(budget=512, score='retrieval', errors='uniform', roles='{roles}')",
    "task-kv(budget=0.4)",
    "tappa(budget=512)",
    "moa(budget=0.5, plan='uniform')",
    "long-gen()",
    "quest(budget=1024)",
    "tidal(budget=256)",
    "token-select()",
    "recycled(budget=4096)",
    "fasa(budget=0.189, chunks='slowest', heads='kv')",
    "spatten(budget=0.5)",
    "hip()",
    "hip(refresh=8)",
    "hisa()",
)
"""Methods as their papers run them; what the papers say of them stands in `docs/keep.py`."""
SLOW = 1.0  # seconds of two layers at one length above which the next length's reading is left out
WINDOWS = (1024, 4096)


class Random:
    """One layer's random queries, keys and values of a prompt, and exact statistics of them, shared by all layers and methods."""

    def __init__(self, model, tokens: int):
        config, how = model.config, {"device": model.device, "dtype": model.dtype}
        dim = config.head_dim
        self.q = torch.randn(1, config.num_attention_heads, tokens, dim, **how)
        self.k, self.v = (torch.randn(1, config.num_key_value_heads, tokens, dim, **how) for _ in range(2))
        self.logit, self.tokens, self.found = Logit(dim**-0.5, None, None), tokens, {}

    def stats(self, needs) -> dict:
        for need in needs - self.found.keys() - {"whole_prompt"}:
            if "lse" not in self.found:
                self.found["lse"] = ops.attend(self.q, self.k, self.v, scale=self.logit.scale, need_lse=True)[1]
            name, _, window = need.partition(":")
            rows = (max(0, self.tokens - int(window or self.tokens)), self.tokens)
            if name != "lse":
                how = {"scale": self.logit.scale, "want": {name}, "rows": rows}
                self.found[need] = ops.attention_stats(self.q, self.k, self.found["lse"], **how)[name]
        return self.found


def left(session, random: Random):
    """The store the session's method leaves of a prompt of random keys, layer by layer, by its own hooks."""
    store = session.new_store()
    pass_ = Pass(session, store, [0], random.tokens, False, True, None)
    for n, m in enumerate(iterate(session.method)):
        pass_.key[n] = m.begin(pass_)
    for i in session.info.layers:
        layer, parts = store.layers[i], session.active[i]
        layer.rows.append(random.k, random.v, 0)
        layer.columns, layer.is_initialized = random.tokens, True
        step = Step(pass_, i, layer.rows, random.q, random.k, random.v, random.logit)
        for m, plan in parts:
            step.plan = plan
            stats = random.stats(m.needs)
            for need in m.needs - {"whole_prompt"}:
                step.stats[need.partition(":")[0]] = stats[need]
            if "keep" in m.asks:
                m.select(step)  # what keeps over layers begins here
        let_go(step, parts)
    store.counts = [random.tokens]
    for m in iterate(session.method):
        m.end(pass_)
    return store


def decode_row(model, method: str | None, random: Random) -> dict:
    """Milliseconds of a step and what is resident."""
    with torch.no_grad(), foveal.attach(model, method) as session:
        store = left(session, random)
        held, dense = store.nbytes, store.dense_nbytes
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        step = lambda: model(ids, past_key_values=store).logits
        cycle = max(
            (max(getattr(m, "stride", 1), getattr(m, "refresh", 1)) for m in iterate(session.method)), default=1
        )  # cheap steps, then a full one
        for _ in range(max(8, 6 * cycle) if model.device.type == "cuda" else 1):
            step()
        graphs = session.graphs
        return {
            "decode_ms": median(step, model, cycle),
            "captured": graphs is not None and graphs.captured is not None,
            "why": None if graphs is None else graphs.why,
            "cache_bytes": held,
            "of_dense_bytes": held / dense,
            "read_share": session.read_share,
        }


def median(step, model, cycle: int = 1) -> float:
    if model.device.type == "cuda":
        return _median(step, steps=max(12, cycle))
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def reading(model, method: str | None, tokens: int) -> float:
    """Seconds to read a prompt."""
    ids = torch.randint(0, 1000, (1, tokens), device=model.device)
    with torch.no_grad(), foveal.attach(model, method):
        model(ids[:, : min(4096, tokens)], logits_to_keep=1)
        best = []
        for _ in range(2 if tokens <= 32768 else 1):
            wait(model)
            start = time.perf_counter()
            model(ids, logits_to_keep=1)
            wait(model)
            best.append(time.perf_counter() - start)
    return min(best)


def anew(model, tokens: int) -> float:
    """Seconds in which the stock model reads a window, keeping nothing."""
    ids = torch.randint(0, 1000, (1, tokens), device=model.device)
    best = []
    with torch.no_grad():
        for _ in range(3):
            wait(model)
            start = time.perf_counter()
            model(ids, use_cache=False, logits_to_keep=1)
            wait(model)
            best.append(time.perf_counter() - start)
    return min(best)


def wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def roles_of(model, folder: Path) -> str:
    """Random head roles of this model, as a file."""
    identity = model_identity(model)
    scores = torch.rand(3, identity["layers"], identity["heads"], generator=torch.Generator().manual_seed(0))
    names = ("retrieval", "induction", "echo")
    path = folder / f"{identity['layers']}.json"
    return str(HeadRoles(identity, dict(zip(names, scores, strict=True)), {"made": "at random, for timing"}).save(path))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Run:
    """All rows, within `seconds`: what is not reached says so."""

    def __init__(self, model, short, lengths, seconds: float, out: Path | None, arms=ARMS):
        self.model, self.short, self.lengths, self.out, self.arms = model, short, lengths, out, arms
        self.stop = time.perf_counter() + seconds
        self.rows: list[dict] = []
        self.slow: set[str] = set()

    def all(self) -> list[dict]:
        self._windows()
        with tempfile.TemporaryDirectory() as folder:
            roles = {m: roles_of(m, Path(folder)) for m in (self.model, self.short)}
            for tokens in self.lengths:
                self._length(tokens, roles)
        return self.rows

    def _add(self, row: dict) -> None:
        self.rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if v is not None}, flush=True)
        if self.out is not None:
            save(self.out, {"rows": self.rows})

    def _windows(self) -> None:
        """StreamingLLM's baseline: the stock model reads the window anew for each token."""
        for size in WINDOWS:
            row = {"method": f"window read anew, {size} tokens", "tokens": size}
            self._add(row | {"decode_ms": anew(self.model, size) * 1e3})

    def _length(self, tokens: int, roles: dict) -> None:
        dense = {"method": "dense", "tokens": tokens}
        if self.model.device.type == "cuda":
            by = Dense(self.model, 1, tokens).ms()
            free()
            dense |= {"decode_ms": min(by.values()), "by": by}
        else:
            dense |= {"decode_ms": decode_row(self.model, None, Random(self.model, tokens))["decode_ms"]}
        read = reading(self.short, None, tokens)
        self._add(dense | {"reading_s": read})
        random = Random(self.model, tokens)
        for arm in self.arms:
            row = {"method": arm.replace(", roles='{roles}'", "").replace("roles='{roles}'", ""), "tokens": tokens}
            if time.perf_counter() > self.stop:
                self._add(row | {"error": "not reached in the time given"})
                continue
            try:
                row |= decode_row(self.model, arm.replace("{roles}", roles[self.model]), random)
                row["decode_speedup"] = dense["decode_ms"] / row["decode_ms"]
                free()
                if arm not in self.slow:
                    took = reading(self.short, arm.replace("{roles}", roles[self.short]), tokens)
                    row |= {"reading_s": took, "reading_of_dense": took / read}
                    self.slow |= {arm} if took - read > SLOW else set()
            except (foveal.FovealError, RuntimeError) as error:  # out of memory, or a model too small for a method
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            free()
            self._add(row)


def _tiny(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--seconds", type=float, default=140, help="no method is begun after so many")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does the command work?")
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    model, short = (_tiny(4), _tiny(2)) if options.tiny else (llama_8b(), llama_8b(layers=2))
    Run(model, short, lengths, options.seconds, options.out).all()


if __name__ == "__main__":
    main()

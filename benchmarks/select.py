"""What methods that select keys of a prompt are worth on an H100: their attention and a whole prefill against cuDNN dense.

    python -m benchmarks.select [--out benchmarks/results/select-h100-DATE.json] [--lengths 32768,65536,131072]

Four layers of the shape of Llama 3 8B with random weights, through the ordinary session, selection included. Random weights attend
evenly, so queries and keys of every layer are put in the place of the model's own: drawn with sinks, a decay over distance and a few
tokens that all look at, differently in each head. How much a method that adapts reads is what it reads of these.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import foveal
from foveal.hub import model_identity
from foveal.methods.select.boundaries import BoundaryPredictor
from foveal.methods.select.learned import Learned
from foveal.methods.select.work import Work, work_of
from foveal.ops import index_flat, index_two_stage
from foveal.selection import All

from .record import save

LAYERS = 4
CLAIMS = {
    "token-sparse": "attention up to 3.23x at 128k",
    "hip": "decode attention up to 36.9x; prompts in O(T log T)",
    "hisa": "its indexer 2x at 32k, 4x at 128k",
    "flux": "prefill up to 2.8x, by the share of sparse layers",
    "dhsa": "20 to 60 % less latency at 8k",
    "power-attention": "3.0x at 128k",
    "flex-prefill": "attention 2.4x (gamma 0.95) to 3.5x (0.9) at 128k",
    "xattention": "attention up to 13.5x",
    "minference": "a million tokens 10x",
}


def methods(predictor: str) -> dict[str, str]:
    """What each row is called, and the method in text form: all layers sparse, defaults unless said."""
    every = f"layers={tuple(range(LAYERS))}"
    return {
        "minference": "minference",
        "flex-prefill": "flex-prefill",
        "xattention": "xattention",
        "pooled-blocks, 10 %": "pooled-blocks(budget=0.1, block=128)",
        "power-attention": "power-attention",
        "token-sparse": f"token-sparse({every})",
        "token-sparse | xattention": f"token-sparse({every}) | xattention",
        "hip": "hip(dense=0, stride=2)",
        "hip, 128 x 16": "hip(dense=0, budget=2304, recent=256, query_block=128, key_block=16, stride=8)",
        "dhsa": f"dhsa(predictor={predictor!r}, share=True)",
        "flux, sparse layers": "flux(decision='sparse')",
        "hisa": "hisa",
        "hisa, 32 queries a list": "hisa(query_block=32)",
    }


UNITS = {"attention": "ms", "prefill": "s"}
SLOW = {"hisa"}
"""Lists for each query and KV head: measured in one round."""


class Clock:
    """Moments on the device, or on a CPU."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def time(self, call: Callable[[], object]) -> float:
        start = self.mark()
        call()
        return self.seconds(start, self.mark())


@dataclass(frozen=True, eq=False)
class Start(foveal.Method):
    """Puts the drawn queries and keys in the place of the model's, and notes when selection begins."""

    clock: Clock
    inputs: dict = field(default_factory=dict)
    began: list = field(default_factory=list)

    def select(self, step):
        if not step.decode and "q" in self.inputs and self.inputs["q"].shape[2] == step.L:
            step.q, step.k_new = self.inputs["q"], self.inputs["k"]
        self.began.append(self.clock.mark())
        return All()


@dataclass(frozen=True, eq=False)
class End(foveal.Method):
    """Notes when attention is done, and once what was read."""

    clock: Clock
    ended: list = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

    def mix(self, step, out):
        self.ended.append(self.clock.mark())
        if not self.work:
            self.work.append(work_of(step))
        return out


def drawn(heads: int, kv_heads: int, dim: int, length: int, device: str, dtype) -> tuple[Tensor, Tensor]:
    """Queries and keys whose logits are the sum of noise, a decay over distance, sinks, and a hundredth of tokens all look at.

    A fifth of the dimensions carries the sinks and heavy tokens, the rest the distance by waves of many lengths, as rotary positions do.
    Heads differ in how much of each they have.
    """
    g = torch.Generator(device=device).manual_seed(length)
    rand = lambda *shape: torch.rand(*shape, device=device, generator=g)
    scale, level, waves = dim**-0.5, math.log(length), (dim - dim // 5) // 2
    token = torch.arange(length, device=device)
    frequency = 2 * math.pi / torch.logspace(math.log10(8), math.log10(4 * length), waves, device=device)
    angle = token[:, None] * frequency
    wave = torch.cat([angle.cos(), angle.sin()], -1)  # [length, 2 * waves]
    near = (rand(kv_heads, 1, 1) * level).div(waves * scale).sqrt()  # at most the logarithm of the length at distance 0
    heavy = (rand(kv_heads, length) < 0.01) * rand(kv_heads, length) * 0.7 * level
    heavy[:, :4] = (0.7 + 0.5 * rand(kv_heads, 1)) * level
    rest = dim - 2 * waves
    noise = lambda h: torch.randn(h, length, dim, device=device, generator=g) * 0.8
    k, q, group = noise(kv_heads), noise(heads), heads // kv_heads
    k[..., : 2 * waves] += near * wave
    q[..., : 2 * waves] += near.repeat_interleave(group, 0) * wave
    k[..., dim - rest :] += heavy[..., None] / (rest * scale)
    q[..., dim - rest :] += 1.0
    return q[None].to(dtype), k[None].to(dtype)


def model_of(device: str):
    """Layers of Llama 3 8B on a GPU; elsewhere a small model, to try the command."""
    if device == "cuda":
        from .llama import llama_8b

        return llama_8b(layers=LAYERS)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1 << 18,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def random_predictor(model, folder: str) -> str:
    """A boundary predictor of this model's size that has learned nothing: its time is that of any."""
    config = model.config
    made = BoundaryPredictor(config.num_key_value_heads * config.head_dim)
    learned = Learned("dhsa", model_identity(model), made.state_dict(), {"window": made.window}, {})
    return str(learned.save(Path(folder) / "dhsa.safetensors"))


# ---------------------------------------------------------------------- measurements


def dense(model, clock: Clock, ids: Tensor, q: Tensor, k: Tensor, v: Tensor, rounds: int) -> dict:
    """The stock model and one layer's attention, by cuDNN on a GPU."""
    attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    backends = [SDPBackend.CUDNN_ATTENTION] if clock.cuda else [SDPBackend.FLASH_ATTENTION]
    with torch.no_grad(), sdpa_kernel(backends):
        read = lambda: model(ids, logits_to_keep=1)
        read(), attend()
        whole = min(clock.time(read) for _ in range(rounds))
        layer = statistics.median(clock.time(attend) for _ in range(5))
    name = "dense, cuDNN" if clock.cuda else "dense"
    return {"tokens": ids.shape[1], "method": name, "density": 1.0, "attention_ms": layer * 1e3, "prefill_s": whole}


def selecting(model, clock: Clock, name: str, text: str, ids: Tensor, q: Tensor, k: Tensor, rounds: int) -> dict:
    """The same with a method: attention is selection and attention of the median layer."""
    start, end = Start(clock, {"q": q, "k": k}), End(clock)
    with torch.no_grad(), foveal.attach(model, start | foveal.get_method(text) | end):
        model(ids, logits_to_keep=1)
        start.began.clear(), end.ended.clear()
        whole = min(clock.time(lambda: model(ids, logits_to_keep=1)) for _ in range(rounds))
    layers = [clock.seconds(a, b) for a, b in zip(start.began, end.ended, strict=True)]
    setting = {key: x for key, x in foveal.get_method(text).params.items() if key != "predictor"}
    work = end.work[0]
    row = {"tokens": ids.shape[1], "method": name, "setting": setting, "density": work.density}
    row |= {"flops": work.flops, "bytes": work.bytes}
    return row | {"attention_ms": statistics.median(layers) * 1e3, "prefill_s": whole}


def indexers(clock: Clock, length: int, device: str, dtype) -> dict:
    """An indexer of DeepSeek's size (64 heads of 128), 2,048 tokens of the last queries of a text: all scored, and in two stages."""
    g = torch.Generator(device=device).manual_seed(1)
    heads, dim, queries, budget, block = (64, 128, 1024, 2048, 128) if clock.cuda else (4, 16, 8, 64, 8)
    q = torch.randn(1, heads, queries, dim, device=device, generator=g).to(dtype)
    w = torch.rand(1, heads, queries, device=device, generator=g).to(dtype)
    k = torch.randn(1, length, dim, device=device, generator=g)
    k = (k.cumsum(1) / torch.arange(1, length + 1, device=device).sqrt()[:, None] + 0.3 * k).to(
        dtype
    )  # neighbours alike
    calls = {
        "flat": lambda: index_flat(q, w, k, budget),
        "two stages": lambda: index_two_stage(q, w, k, budget, block=block, blocks=64),
    }
    with torch.no_grad():
        found = {name: call() for name, call in calls.items()}
        ms = {name: statistics.median(clock.time(call) for _ in range(3)) * 1e3 for name, call in calls.items()}
    a, b = (x[0, ::64].tolist() for x in found.values())
    same = [len(set(x) & set(y)) / len(set(x) | set(y)) for x, y in zip(a, b, strict=True)]
    row = {"tokens": length, "flat_ms": ms["flat"], "two_stages_ms": ms["two stages"], "queries": queries}
    return row | {"faster": ms["flat"] / ms["two stages"], "same_tokens": sum(same) / len(same)}


def run(lengths: list[int], out: Path | None, device: str, limit: float) -> None:
    began, dtype = time.perf_counter(), torch.bfloat16 if device == "cuda" else torch.float32
    clock, model, rows, index_rows = Clock(device), model_of(device), [], []
    config = model.config
    shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    with tempfile.TemporaryDirectory() as folder:
        texts = methods(random_predictor(model, folder))
        for length in lengths:
            ids = torch.randint(0, 1000, (1, length), device=device)
            q, k = drawn(*shape, length, device, dtype)
            rounds = 2 if length <= 65536 else 1
            base = dense(model, clock, ids, q, k, torch.randn_like(k), rounds)
            index_rows.append(indexers(clock, length, device, dtype))
            rows.append(base)
            _show(index_rows[-1], base)
            for name, text in texts.items():
                if time.perf_counter() - began > limit:
                    rows.append({"tokens": length, "method": name, "skipped": f"{limit:.0f} s had passed"})
                else:
                    row = selecting(model, clock, name, text, ids, q, k, 1 if name in SLOW else rounds)
                    row |= {f"{x}_faster": base[f"{x}_{unit}"] / row[f"{x}_{unit}"] for x, unit in UNITS.items()}
                    rows.append(row | {"claim": CLAIMS.get(name.partition(",")[0], "")})
                _show(rows[-1])
                if device == "cuda":
                    torch.cuda.empty_cache()
            if out is not None:
                save(out, {"layers": LAYERS, "rows": rows, "indexers": index_rows})
    print(f"{time.perf_counter() - began:.0f} s")


def _show(*rows: dict) -> None:
    for row in rows:
        told = {
            key: round(x, 4) if isinstance(x, float) else x for key, x in row.items() if key not in ("setting", "claim")
        }
        print(told, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", default="32768,65536,131072")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=140, help="seconds after which nothing new is begun")
    chosen = parser.parse_args()
    run([int(n) for n in chosen.lengths.split(",")], chosen.out, chosen.device, chosen.limit)


if __name__ == "__main__":
    main()

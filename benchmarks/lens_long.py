"""All sink and role lenses on a long text and a model of the shape of Llama 3 8B; and how far explicit attention weights go there.

    python -m benchmarks.lens_long --device cuda --length 131072 [--only lenses,weights,library] [--out FILE]
    python -m benchmarks.lens_long --tiny        (a small model on the CPU: does it run?)

Weights and tokens are random: time and memory do not depend on what a text says. The text ends with a copy of a stretch of its middle, so
that retrieval heads have something to be asked for. One reading measures everything; each lens's own time lies inside it, statistics that
several lenses share are counted apart, and a reading without lenses is timed beside it. Kernels are compiled by a short text beforehand.

weights: `output_attentions=True` of transformers with eager attention, no cache, one row of logits. library: TransformerLens on the same
model, `run_with_cache` for nothing but the attention patterns. Both are asked for longer and longer texts, in steps of 64 tokens, until
memory is out. What needs many passes by its nature (influence by ablation, circuits, active heads over domains) is not here.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foveal.lens import look
from foveal.lens.capacity import Capacity
from foveal.lens.distance import Distance
from foveal.lens.lens import Lens, Piece, Probe, Reading
from foveal.lens.patterns import Patterns
from foveal.lens.profile import Profile
from foveal.lens.receivers import Receivers
from foveal.lens.residual import MassiveActivations, SecondarySinks
from foveal.lens.retrieval import Retrieval
from foveal.lens.sinks import Sinks

from .llama import llama_8b
from .record import save

NEEDLE = 12
WARM_UP = 12_288
STEP = 64
GB = 1e9


class Words:
    """Stands in for a tokenizer: every sixteenth word of the vocabulary ends a sentence."""

    def decode(self, ids: list[int]) -> str:
        return f" w{ids[0]}" + "." * (ids[0] % 16 == 0)

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"w{token}"


def tiny() -> LlamaForCausalLM:
    """The same architecture, small enough for any CPU."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    config = LlamaConfig(
        vocab_size=500, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, **sizes
    )
    return LlamaForCausalLM(config).eval()


def text(model, length: int) -> tuple[list[int], list[Lens]]:
    """Random tokens whose end repeats a stretch of their middle; and all sink and role lenses for it."""
    ids = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    middle = length // 2
    ids[-NEEDLE:] = ids[middle : middle + NEEDLE]
    retrieval = Retrieval((middle, middle + NEEDLE), (length - NEEDLE, length))
    return ids, [Sinks(), SecondarySinks(), MassiveActivations(), Distance(), Receivers(), Patterns(), retrieval]


# ---------------------------------------------------------------------- clocks


@dataclass
class Clock:
    """Seconds that a device spends in marked stretches of its queue."""

    cuda: bool
    marks: list = field(default_factory=list)

    def mark(self) -> None:
        """Begins or ends a stretch."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        return sum(a.elapsed_time(b) / 1e3 for a, b in pairs) if self.cuda else sum(b - a for a, b in pairs)


@dataclass(frozen=True)
class Timed(Lens):
    """A lens and how long it takes, beside the statistics it shares with others."""

    inner: Lens
    clock: Clock
    after: Clock

    name = property(lambda self: self.inner.name)
    paper = property(lambda self: self.inner.paper)
    stats = property(lambda self: self.inner.stats)

    def sizes(self, reading: Reading) -> dict[str, int]:
        return self.inner.sizes(reading)

    def probe(self, reading: Reading) -> Probe:
        return _TimedProbe(self.inner.probe(reading), self.clock, self.after)


class _TimedProbe(Probe):
    def __init__(self, inner: Probe, clock: Clock, after: Clock):
        self.inner, self.clock, self.after = inner, clock, after

    def attention(self, piece: Piece) -> None:
        self.clock.mark()
        self.inner.attention(piece)
        self.clock.mark()

    def hidden(self, layer: int, first: int, h: torch.Tensor) -> None:
        self.clock.mark()
        self.inner.hidden(layer, first, h)
        self.clock.mark()

    def results(self) -> list:
        self.after.mark()
        found = self.inner.results()
        self.after.mark()
        return found


@dataclass(frozen=True)
class Nothing(Lens):
    """Measures nothing: what the reading itself costs."""

    name = "nothing"

    def probe(self, reading: Reading) -> Probe:
        return _NothingProbe()


class _NothingProbe(Probe):
    def results(self) -> list:
        return []


def sync(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def read(model, ids: list[int], lenses: list[Lens]) -> dict:
    """One look, with its seconds, the device memory it took above what was there, and each lens's seconds."""
    cuda = model.device.type == "cuda"
    timed = [Timed(x, Clock(cuda), Clock(False)) for x in lenses]
    release()
    before = torch.cuda.memory_allocated() if cuda else 0
    sync(model)
    start = time.perf_counter()
    seen = look(model, Words(), ids, timed)
    sync(model)
    row = {"tokens": len(ids), "s": time.perf_counter() - start}
    if cuda:
        row["GB_above_model"] = (torch.cuda.max_memory_allocated() - before) / GB
        row["GB_reserved_above_model"] = (torch.cuda.max_memory_reserved() - before) / GB
    spent = {x.name: {"reading_s": x.clock.seconds(), "results_s": x.after.seconds()} for x in timed}
    return row | {"lenses": spent, "measures": len(seen.measures)}


def lenses(model, length: int) -> dict:
    ids, roles = text(model, length)
    short, few = text(model, min(WARM_UP, length))
    plain = [Profile(), Capacity()]
    first = read(model, short, [*few, *plain])
    found = {"first_look": {"tokens": first["tokens"], "s": first["s"]}}
    read(model, short, few)  # statistics asked for together are compiled together
    alone = read(model, ids, [Nothing()])
    for name, chosen in (("sinks and roles", roles), ("all lenses", [*roles, *plain])):
        found[name] = row = read(model, ids, chosen)
        own = sum(x["reading_s"] for x in row["lenses"].values())
        after = sum(x["results_s"] for x in row["lenses"].values())
        row |= {"reading_alone_s": alone["s"], "shared_statistics_s": row["s"] - own - after - alone["s"]}
    found["reading alone"] = {k: v for k, v in alone.items() if k not in ("lenses", "measures")}
    return found


# ---------------------------------------------------------------------- where memory is out


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def longest(fits: Callable[[int], bool], most: int, step: int = STEP) -> dict:
    """The longest text that fits, and the shortest tried that does not, by doubling and halving; in multiples of `step`."""
    good, bad, n = 0, None, step
    while n <= most:
        if not fits(n):
            bad = n
            break
        good, n = n, 2 * n
    while bad is not None and bad - good > step:
        middle = (good + bad) // (2 * step) * step
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return {"fits": good, "out_of_memory_at": bad}


def fits(run: Callable[[int], object]) -> Callable[[int], bool]:
    """Whether run(length) stays within the device's memory."""

    def check(length: int) -> bool:
        release()
        try:
            with torch.no_grad():
                run(length)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        finally:
            release()
        return True

    return check


def weights(model, most: int) -> dict:
    model.set_attn_implementation("eager")

    def run(length: int) -> None:
        ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
        out = model(ids, output_attentions=True, use_cache=False, logits_to_keep=1)
        assert len(out.attentions) == model.config.num_hidden_layers

    return {"what": "transformers, eager, output_attentions=True"} | longest(fits(run), most)


def library(model, most: int) -> dict:
    try:
        from importlib.metadata import version

        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError as missing:
        return {"what": "TransformerLens", "missing": str(missing)}
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    def run(length: int) -> None:
        ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
        patterns = lambda name: name.endswith("hook_pattern")
        _, cache = bridge.run_with_cache(ids, return_type=None, names_filter=patterns)
        assert len(cache) == model.config.num_hidden_layers

    what = f"TransformerLens {version('transformer_lens')}, run_with_cache of the patterns alone"
    return {"what": what} | longest(fits(run), most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--only", default="lenses,weights,library")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    parts = args.only.split(",")
    if args.device != "cuda" and not args.tiny:
        parser.error("the large model is made on a GPU: --device cuda, or --tiny")
    if args.tiny:
        model, length, most = tiny(), 4096, 256
    else:
        model, length, most = llama_8b(positions=args.length), args.length, 32_768
    where = model.device
    found: dict = {
        "model": f"Llama, {model.config.num_hidden_layers} layers, random weights, {model.dtype}",
        "device": str(where),
    }
    if where.type == "cuda":
        found |= {"model_GB": sum(p.nbytes for p in model.parameters()) / GB}
        found |= {"device_GB": torch.cuda.get_device_properties(where).total_memory / GB}
    work = {"lenses": (lenses, length), "weights": (weights, most), "library": (library, most)}
    for name in parts:
        run, size = work[name]
        found[name] = run(model, size)
        print(name, found[name], flush=True)
        if args.out is not None:
            save(args.out, found)


if __name__ == "__main__":
    main()

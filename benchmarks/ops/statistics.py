"""Second passes over the attention probabilities, against the forward pass of flash attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from foveal import ops
from foveal.ops import reference

from .prefill import SCALE, _sdpa, inputs
from .timing import interleaved_ms, relative_error

PASSES = {
    "column mass": {"col_mass"},
    "column mass and low": {"col_mass", "col_low"},
    "row entropy": {"entropy"},
    "sink mass": {"sink_mass"},
    "entropy, sink mass, distance": {"entropy", "sink_mass", "mean_distance"},
    "row maximum and its key": {"row_max", "row_argmax"},
    "offset histogram": {"offset_histogram"},
    "block map": {"block_map"},
    "top 8 of each row": {"top_k", "top_k_keys"},
}


def grid() -> Iterator[dict]:
    """Errors against the full probability matrix in float64."""
    torch.manual_seed(0)
    for dim in (64, 96, 128, 256):
        for group, length in ((1, 129), (3, 300), (4, 1000), (9, 513)):
            q, k, v = inputs(length, dim, 2 * group, 2)
            _, lse = reference.attend(q, k, v, scale=dim**-0.5)
            names = {"col_mass", "entropy", "sink_mass", "mean_distance", "row_max"}
            got = ops.attention_stats(q, k, lse.float(), want=names, scale=dim**-0.5)
            expected = reference.attention_stats(q, k, lse, scale=dim**-0.5)
            errors = {name: relative_error(got[name], expected[name]) for name in names}
            yield {"case": f"stats dim {dim} group {group} length {length}", "error": max(errors.values())}


def run(lengths=(32768, 131072)) -> Iterator[dict]:
    for length in lengths:
        q, k, v = inputs(length)
        _, lse = ops.attend(q, k, v, scale=SCALE, need_lse=True)
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        calls = {name: partial(_sdpa, q, k, v, backend) for name, backend in backends.items()}
        some = PASSES if length <= 65536 else {n: PASSES[n] for n in ("column mass", "row entropy", "block map")}
        for name, want in some.items():
            how = {"block": 128} if name == "block map" and length > 65536 else {}
            calls[name] = partial(ops.attention_stats, q, k, lse, want=want, scale=SCALE, **how)
        times = interleaved_ms(calls, rounds=3)
        for name, ms in times.items():
            yield {
                "case": f"{length}: {name}",
                "ms": ms,
                "of_flash": ms / times["flash"],
                "of_cudnn": ms / times["cudnn"],
            }

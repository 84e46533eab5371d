"""What is measured beside the score: memory, time, the machine, and how sure a score is."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import platform
import sys
import threading
import time
from pathlib import Path

import torch

from ..errors import FovealError


class Memory:
    """Peak memory of the process (CPU: resident set) or of the device (CUDA: allocated), in bytes, from `start` on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Memory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _give_back()
            self.peak = resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, resident())


def _give_back() -> None:
    """Return freed memory to the system, so that what follows is measured and not what came before."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """Resident set size of this process in bytes (0 where the system does not tell)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def now(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Seconds spent inside, added up over all times it was entered; a CPU's, where work is done when a call returns."""

    def __init__(self):
        self.seconds = 0.0
        self._depth, self._start = 0, 0.0

    def __enter__(self) -> Clock:
        if not self._depth:  # what runs the model inside a hook is inside already
            self._start = time.perf_counter()
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._start


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; PyTorch raises a plain RuntimeError for it on a CPU."""
    told = any(words in str(error) for words in ("not enough memory", "can't allocate memory"))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or told


def explain(error: Exception) -> str:
    """What went wrong, in one sentence for a table."""
    if out_of_memory(error):
        return "out of memory: use a smaller --lengths or a smaller model"
    return str(error) if isinstance(error, FovealError) else f"{type(error).__name__}: {error}"


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95 %)."""
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def hardware(device: torch.device) -> dict:
    """What the run ran on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

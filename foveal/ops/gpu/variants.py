"""Compile kernels without a GPU: what every kernel file offers as `variants()`, and what the compiler says of each.

A kernel that spills registers is slow without being wrong, so the tests compile every variant and fail on spills.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Variant:
    """One way a kernel is launched.

    signature: argument name to type, "*bf16", "*i32", "i32", "fp32" or "constexpr".  constants: values of the constexpr arguments.
    options: num_warps, num_stages, maxnreg.  unaligned: arguments not known to be divisible by 16.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)
    unaligned: frozenset[str] = frozenset()


class Resources(NamedTuple):
    """What one program of a compiled kernel takes: registers a thread, bytes of local memory (spills), bytes of shared memory."""

    registers: int
    spills: int
    shared: int


def compile_variant(variant: Variant, capability: int = 90) -> Resources:
    """Compile for a GPU of this compute capability and read what the binary takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource
    if type(variant.kernel).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource as source
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.signature[n] for n in names}
    constants = {(names.index(n),): v for n, v in variant.constants.items()}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if (signature[n].startswith("*") or signature[n] in ("i32", "i64")) and n not in variant.unaligned
    }
    built = triton.compile(
        source(variant.kernel, signature, constants, attrs),
        target=GPUTarget("cuda", capability, 32),
        options=dict(variant.options),
    )
    return _resources(built.asm["cubin"], built.metadata.shared)


def _resources(cubin: bytes, shared: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [_cuobjdump(), "-res-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local, shared)


def _cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump") or "cuobjdump"

"""What every launch needs."""

from __future__ import annotations

import triton
from torch import Tensor

from foveal.ops.route import capability

LOG2E = 1.4426950408889634  # kernels exponentiate in base 2
LN2 = 0.6931471805599453


def dependent(x: Tensor) -> tuple[bool, dict[str, bool]]:
    """Programmatic dependent launch where the GPU has it: the next kernel's ramp overlaps this one's end.

    Returns the kernel's PDL flag and the keywords of its launch.
    """
    pdl = x.is_cuda and capability(x.device.index)[0] >= 9
    return pdl, {"launch_pdl": True} if pdl else {}


def given(x: Tensor | None, placeholder: Tensor) -> Tensor:
    """A pointer for an argument that may be absent; the kernel is told not to read it."""
    return placeholder if x is None else x


def padded(dim: int) -> int:
    """The power of two that holds a head, at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(dim))

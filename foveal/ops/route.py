"""Which implementation an operation takes for given arguments, and why; asked with `foveal.ops.which`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.errors import InputError, suggest


class Route(NamedTuple):
    """The implementation taken, and the reason in words."""

    name: str
    why: str


ROUTES: dict[str, Callable[..., Route]] = {}


def routed(op: str) -> Callable[[Callable[..., Route]], Callable[..., Route]]:
    """Decorator for the function that picks the route of `op` from the operation's own arguments."""

    def register(choose: Callable[..., Route]) -> Callable[..., Route]:
        ROUTES[op] = choose
        return choose

    return register


def which(op: str, *args: Any, **kwargs: Any) -> Route:
    """The implementation `foveal.ops.<op>` takes for these arguments, and why; nothing is computed.

    Raises InputError for an unknown operation.
    """
    if op not in ROUTES:
        raise InputError(f"no operation called '{op}': {suggest(op, ROUTES)}")
    return ROUTES[op](*args, **kwargs)


@cache
def has_triton() -> bool:
    """Triton can be imported here."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def no_kernel(x: Tensor) -> str | None:
    """Why no Triton kernel can run on this tensor's device; None if one can."""
    if x.device.type != "cuda":
        return f"the tensors are on {x.device.type}"
    if not has_triton():
        return "triton is not installed (pip install 'foveal[gpu]')"
    if torch.version.hip is None and capability(x.device.index) < (8, 0):
        return "the GPU is older than Ampere"
    return None


def hopper(x: Tensor) -> bool:
    """This tensor lies on a Hopper GPU, whose instructions the Gluon kernels use."""
    return x.is_cuda and torch.version.hip is None and capability(x.device.index)[0] == 9

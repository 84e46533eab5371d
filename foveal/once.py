"""What is the same in every layer of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Once:
    """Tensors that the first layer to ask computes, on each device that has layers, and the others are given. Never written to."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Tensor] = {}

    def __call__(self, device: torch.device, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if (device, key) not in self._known:
            self._known[device, key] = make()
        return self._known[device, key]

"""What travels to a worker and back: the model with its tokenizer, and results or exceptions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch

from ..errors import FovealError, InputError

Make = Callable[[Any, Any], Callable[[Any], Any]]
_RECORDS = "_output_capturing_hooks_installed"


def packed(make: Make, model, tokenizer) -> bytes:
    """What a worker needs, with the weights on the CPU."""
    if model.device.type != "cpu" or any(hasattr(m, _RECORDS) for m in model.modules()):
        model = _without_recorders(copy.deepcopy(model).cpu())
    try:
        return pickle.dumps((make, model, tokenizer))
    except Exception as error:
        raise InputError(
            f"this model or its tokenizer cannot be sent to other processes ({error}): run without workers"
        ) from None


def _without_recorders(model):
    """Whoever was asked for hidden states carries hooks of transformers that no pickle takes; new ones come where they are needed."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                    del hooks[key]
        vars(module).pop(_RECORDS, None)
    return model


def unpacked(data: bytes, device: str, threads: int) -> Callable[[Any], Any]:
    """The worker that was `packed`, on a device of its own."""
    torch.set_num_threads(threads)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # kernels are launched on the current one
    make, model, tokenizer = pickle.loads(data)
    # transformers notes once a process, where a model is made, which outputs its class records.
    with torch.device("meta"):
        type(model)(model.config)
    return make(model.to(device), tokenizer)


def outcome(worker: Callable[[Any], Any], cell: Any) -> tuple[bool, Any]:
    """(True, result) or (False, exception), in a form that can be sent."""
    try:
        return True, worker(cell)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = FovealError(f"{type(error).__name__}: {error}")
        return False, error

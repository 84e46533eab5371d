"""Multi-query associative recall (Zoology; Arora et al., 2023): synthetic batches for layers that are trained."""

import numpy as np
import torch
from torch import Tensor

from foveal.errors import InputError

IGNORED = -100


def mqar(
    batch: int, length: int, pairs: int, vocab: int = 8192, power: float = 0.01, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both `[batch, length]` int64: `pairs` of key and value, then each key once more.

    Keys come from 1 to vocab/2 - 1, values from vocab/2 on, without repeats in a row. A key returns `2 g` tokens after
    the pairs, g from 0 drawn without replacement with probability proportional to `power * (g + 1)^(power - 1)`; the
    label there is its value, elsewhere -100. The other slots hold random tokens. vocab and power: the paper's.

    Raises `InputError` unless 4 pairs <= length < vocab and the vocabulary has a key for each pair.
    """
    for name, value in (("batch", batch), ("length", length), ("pairs", pairs), ("vocab", vocab)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"Expected {name} to be a positive whole number, got {value!r}; choose one.")
    if 4 * pairs > length or length >= vocab or pairs > vocab // 2 - 1:
        raise InputError(
            f"Expected 4 * pairs <= length < vocab and pairs < vocab / 2, got pairs {pairs}, length {length}, vocab "
            f"{vocab}; use fewer pairs or a larger vocabulary."
        )
    rng = np.random.default_rng(seed)
    rows, places = np.arange(batch)[:, None], (length - 2 * pairs) // 2
    keys = np.stack([rng.choice(np.arange(1, vocab // 2), pairs, replace=False) for _ in range(batch)])
    values = np.stack([rng.choice(np.arange(vocab // 2, vocab), pairs, replace=False) for _ in range(batch)])
    weights = power * np.arange(1, places + 1) ** (power - 1)
    gaps = np.stack([rng.choice(places, pairs, replace=False, p=weights / weights.sum()) for _ in range(batch)])
    inputs = rng.integers(0, vocab, (batch, length))
    labels = np.full((batch, length), IGNORED)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    inputs[rows, 2 * pairs + 2 * gaps] = keys
    labels[rows, 2 * pairs + 2 * gaps] = values
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def mqar_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of queries whose value has the highest logit; logits `[batch, length, vocab]`, labels of `mqar`."""
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"Expected logits [batch, length, vocab] for labels {list(labels.shape)}, got {list(logits.shape)}."
        )
    asked = labels != IGNORED
    return (logits.argmax(-1)[asked] == labels[asked]).double().mean().item()

"""How sure a mean or a difference is: seeded bootstrap intervals over samples, paired where two arms saw the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .errors import InputError

ROUNDS = 10_000
"""Resamples: with these the ends of a 95 % interval are stable to about a hundredth of its width."""
_HELD = 1 << 22  # indices held at once


class Interval(NamedTuple):
    """A mean over `n` samples and its 95 % interval; low and high are None for a single sample."""

    mean: float
    low: float | None
    high: float | None
    n: int


def bootstrap(
    values: Sequence[float], *, bounds: tuple[float, float] | None = None, rounds: int = ROUNDS, seed: int = 0
) -> Interval:
    """The mean of `values` with its 95 % percentile bootstrap interval (Efron 1979); the same seed gives the same ends.

    bounds: the least and the largest value there can be. Samples that all agree would resample to an interval of no width; with
    bounds it is widened by the rule of three: what was not seen in n samples has at most a share of 3 / n.
    Raises InputError for no values, for values that are not finite and for values out of bounds.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all():
        raise InputError(f"expected a list of at least one number, all finite, got {np.array2string(x, threshold=8)}")
    if bounds is not None and not (bounds[0] <= x.min() and x.max() <= bounds[1]):
        raise InputError(f"expected values from {bounds[0]} to {bounds[1]}, got {x.min()} to {x.max()}")
    mean, n = float(x.mean()), x.size
    if n == 1:
        return Interval(mean, None, None, 1)
    if bounds is not None and np.ptp(x) == 0:
        unseen = min(1.0, 3 / n)
        return Interval(mean, mean - unseen * (mean - bounds[0]), mean + unseen * (bounds[1] - mean), n)
    rng, means, at_once = np.random.default_rng(seed), np.empty(rounds), max(1, _HELD // n)
    for start in range(0, rounds, at_once):
        stop = min(start + at_once, rounds)
        means[start:stop] = x[rng.integers(0, n, (stop - start, n))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(mean, float(low), float(high), n)


def paired_bootstrap(
    values: Sequence[float],
    baseline: Sequence[float],
    *,
    bounds: tuple[float, float] | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Interval:
    """The mean of `values - baseline` over the same samples, with its 95 % interval: whole pairs are resampled.

    What makes a sample hard for both arms cancels, so the interval is narrower than that of two separate means. bounds: those of a
    difference; see `bootstrap`. Raises InputError where the two are not of one length, too.
    """
    if len(values) != len(baseline):
        raise InputError(
            f"expected both arms on the same samples, got {len(values)} and {len(baseline)} scores: score the same list twice"
        )
    gains = [a - b for a, b in zip(values, baseline, strict=True)]
    return bootstrap(gains, bounds=bounds, rounds=rounds, seed=seed)

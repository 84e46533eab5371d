"""Bootstrap intervals against what is known in closed form."""

import math
import random

import pytest

from foveal.errors import InputError
from foveal.stats import bootstrap, paired_bootstrap


def binomial_quantile(n, p, q):
    """The least k with P(X <= k) >= q for X ~ Binomial(n, p), as a share of n."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k / n
    return 1.0


@pytest.mark.parametrize(("right", "n"), [(3, 20), (10, 20), (45, 50)])
def test_resampled_shares_are_binomial(right, n):
    """Resampling `right` ones among n draws Binomial(n, right / n), so the ends are its quantiles, to one step."""
    found = bootstrap([1.0] * right + [0.0] * (n - right))
    assert found.mean == right / n and found.n == n
    assert found.low == pytest.approx(binomial_quantile(n, right / n, 0.025), abs=1 / n)
    assert found.high == pytest.approx(binomial_quantile(n, right / n, 0.975), abs=1 / n)


def test_many_samples_give_the_normal_interval():
    rng = random.Random(1)
    x = [rng.gauss(2.0, 3.0) for _ in range(2000)]
    found = bootstrap(x)
    half = 1.96 * math.sqrt(sum((v - found.mean) ** 2 for v in x) / len(x)) / math.sqrt(len(x))
    assert found.low == pytest.approx(found.mean - half, abs=0.05 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.05 * half)


def test_what_is_hard_for_both_arms_cancels():
    rng = random.Random(2)
    hard = [rng.gauss(0.0, 5.0) for _ in range(100)]
    better = [x + 0.1 + rng.gauss(0.0, 0.01) for x in hard]
    found = paired_bootstrap(better, hard)
    assert 0.09 < found.low < found.mean < found.high < 0.11
    alone = bootstrap(better)
    assert alone.high - alone.low > 1.0


def test_the_sign_is_that_of_the_first_arm():
    assert paired_bootstrap([1.0, 1.0, 0.0], [0.0, 0.0, 0.0]).mean == pytest.approx(2 / 3)
    assert paired_bootstrap([0.0, 0.0, 0.0], [1.0, 1.0, 0.0]).mean == pytest.approx(-2 / 3)


def test_one_seed_one_interval():
    x = [random.Random(3).random() * i for i in range(30)]
    assert bootstrap(x, seed=5) == bootstrap(x, seed=5)
    assert bootstrap(x, seed=5) != bootstrap(x, seed=6)


def test_samples_that_agree_are_not_certain():
    """20 equal answers leave room for 3 / 20 that were not seen, as far as the bounds allow."""
    assert bootstrap([0.0] * 20, bounds=(-1, 1))[1:3] == pytest.approx((-0.15, 0.15))
    assert bootstrap([1.0] * 20, bounds=(0, 1))[1:3] == pytest.approx((0.85, 1.0))
    assert bootstrap([1.0, 1.0], bounds=(0, 1))[1:3] == pytest.approx((0.0, 1.0))
    assert bootstrap([0.5] * 20)[1:3] == (0.5, 0.5)


def test_a_single_sample_has_no_interval():
    assert bootstrap([0.25]) == (0.25, None, None, 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 0.0]])
def test_what_cannot_be_resampled_is_refused(values):
    with pytest.raises(InputError, match="at least one number, all finite"):
        bootstrap(values)


def test_values_out_of_bounds_and_lists_of_two_lengths_are_refused():
    with pytest.raises(InputError, match=r"values from 0 to 1, got -1\.0 to 0\.0"):
        bootstrap([0.0, -1.0], bounds=(0, 1))
    with pytest.raises(InputError, match="got 2 and 1 scores"):
        paired_bootstrap([0.0, 1.0], [0.0])

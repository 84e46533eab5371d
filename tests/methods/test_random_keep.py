"""The random keeper: what is safe, how evenly it draws, and what a draw depends on."""

import pytest
import torch
from models import tiny
from reference import watch

from foveal.methods.keep.random_keep import RandomKeep

N, PROMPT, KV = 66, 60, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(15))


def kept(model, method, ids, chunks=(PROMPT,)):
    return watch(model, method, ids, chunks).kept


def test_sinks_the_newest_and_as_many_as_the_budget_says(model, ids):
    for call, layers in enumerate(kept(model, RandomKeep(24, sink=3, recent=6), ids)):
        for row in (row for batch in layers for heads in batch for row in heads):
            assert len(row) == 24 + call
            assert {0, 1, 2, *range(54, PROMPT + call)} <= set(row)
    (row,) = {tuple(row) for b in kept(model, RandomKeep(5, sink=4, recent=3), ids)[0] for h in b for row in h}
    assert row == (0, 1, 57, 58, 59)  # what does not fit is cut from the sinks


def test_a_draw_depends_on_seed_layer_head_and_place_alone(model, ids):
    first = kept(model, RandomKeep(24, sink=0, recent=0), ids)[0]
    assert first[0][0] == first[0][1]  # two texts
    assert len({tuple(row) for layer in first for row in layer[0]}) == 4  # layers and heads
    assert kept(model, RandomKeep(24, sink=0, recent=0, seed=1), ids)[0][0][0] != first[0][0]
    # every key has its number once and for all, so pieces leave what the whole leaves
    rolling = RandomKeep(24, sink=0, recent=0, rolling=True)
    assert kept(model, rolling, ids, (30, 20, 10))[2] == first


def test_draws_are_uniform(model, ids):
    counts = torch.zeros(PROMPT)
    for seed in range(150):
        for batch in kept(model, RandomKeep(20, sink=0, recent=0, seed=seed), ids[:1, :PROMPT])[0]:
            for row in batch[0]:
                counts[row] += 1
    # 600 draws of a third: five standard deviations of a binomial are 58
    assert counts.sum() == 600 * 20
    assert (counts - 200).abs().max() < 58
    assert counts.std() > 5  # and not a fixed pattern

"""MInference's vertical-slash pattern against the weights of the last queries, cell by cell."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, watch, weights

import foveal
from foveal.methods.select.minference import MInference

N, PROMPT, HEADS = 140, 134, 6


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def chosen(s, prompt, method):
    """[HEADS, n, n]: what each query of the prompt reads."""
    n, b = s.q.shape[1], method.block
    visible = causal(n).expand(HEADS, -1, -1).clone()
    w = weights(s, causal(n)[None])[:, prompt - method.last : prompt, :prompt]
    size = method.budget if isinstance(method.budget, int) else math.ceil(method.budget * prompt - 1e-9)
    columns, count = round(size * method.vertical), math.ceil(prompt / b)
    for h in range(HEADS):
        vertical, slash = [0.0] * count, [0.0] * (count + 1)
        for i in range(method.last):
            for j in range(prompt - method.last + i + 1):
                vertical[j // b] += w[h, i, j].item()
                o = prompt - method.last + i - j
                # of the cells at token distance o, this share lies one diagonal of blocks further
                slash[o // b] += w[h, i, j].item() * (1 - o % b / b)
                slash[o // b + 1] += w[h, i, j].item() * (o % b / b)
        rank = lambda x, forced: sorted(range(count), key=lambda a: (a >= math.ceil(forced / b), -x[a]))
        v = rank(vertical, method.sink)[: max(math.ceil(method.sink / b), math.ceil(columns / b))]
        d = rank(slash, method.recent)[: max(math.ceil(method.recent / b), math.ceil((size - columns) / b))]
        block = torch.arange(prompt) // b
        distance = block[:, None] - block
        read = torch.isin(block, torch.tensor(v))[None, :] | torch.isin(distance, torch.tensor(d))
        visible[h, :prompt, :prompt] &= read
    return visible


@pytest.mark.parametrize(
    "method",
    [MInference(0.3, 0.3, 8, 3, 9, 8), MInference(40, 0.5, 16, 6, 1, 4), MInference(30, 0.9, 5, 3, 9, 7)],
    ids=str,
)
@pytest.mark.parametrize("pads", [None, (0, 13)])
def test_every_query_reads_the_columns_and_diagonals_the_last_ones_look_at(pads, method, model, ids):
    unread = 0
    for _, _, s in watch(model, method, ids, (PROMPT,), pads).each():
        n = s.q.shape[1]
        visible = chosen(s, n - (N - PROMPT), method)
        assert close(s.out, attend(s, visible))
        unread += int((causal(n) & ~visible).sum())
    assert unread > 1000


def test_the_start_and_the_newest_distances_are_always_read(model):
    """With the least budget each head reads what is forced: 30 tokens are two blocks of 16, 100 distances are seven diagonals."""
    ids = torch.randint(1, 120, (1, 240), generator=torch.Generator().manual_seed(8))
    for _, _, s in watch(model, MInference(2, 0.5, 8, block=16), ids, (240,)).each():
        block = torch.arange(240) // 16
        visible = causal(240) & ((block < 2) | (block[:, None] - block < 7))
        assert (causal(240) & ~visible).any()
        assert close(s.out, attend(s, visible[None]))


def test_bad_values():
    with pytest.raises(foveal.InputError, match="vertical = 2: expected a number from 0 to 1"):
        MInference(vertical=2)
    with pytest.raises(foveal.InputError, match="last = 0"):
        MInference(last=0)

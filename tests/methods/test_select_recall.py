"""What the benchmark of recall counts, against sorting written out."""

import sys
from pathlib import Path

import pytest
import torch
from models import tiny
from reference import hook, weights

import foveal
from foveal.selection import Lists

sys.path.append(str(Path(__file__).parents[2]))  # the scripts are no part of the package
from benchmarks.select_recall import Probe, found

N, HEADS, KV = 75, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (1, N), generator=torch.Generator().manual_seed(8))


def sums(model, ids, method):
    probe = Probe()
    with torch.no_grad(), foveal.attach(model, method | probe):
        model(ids)
    return probe


def expected(step, queries):
    """[recall, weight, best, how many] of each query and head that reads anything, by sets."""
    s = type("S", (), {"q": step.q[0].double(), "k": step.k_new[0].double()})
    p = weights(s, torch.ones(N, N, dtype=torch.bool).tril()[None])
    seen = step.per_head_like(step.visible.mask(step, 0, N), HEADS).expand(1, HEADS, -1, -1)[0]
    total = [0.0] * 4
    for i in queries:
        for h in range(HEADS):
            read = {j for j in range(i + 1) if seen[h, i, j]}
            if not read:
                continue
            best = sorted(range(i + 1), key=lambda j: -p[h, i, j])[: len(read)]
            total[0] += len(read & {*best}) / len(read)
            total[1] += sum(p[h, i, j].item() for j in read)
            total[2] += sum(p[h, i, j].item() for j in best)
            total[3] += 1
    return total


@pytest.mark.parametrize(
    "method",
    [
        "pooled-blocks(budget=0.3, block=8)",
        "hisa(budget=0.3, block=4, blocks=5)",
        "token-sparse(drop=0.3, least=8, window=8, kernel=3, layers=(0, 1))",
    ],
)
def test_recall_is_counted_by_sets(method, model, ids):
    want = []
    note = hook(
        after=lambda step: want.append((expected(step, (8, 17, 26, 36, 45, 55, 64, 74)), found(step, 8).tolist()))
    )
    with torch.no_grad(), foveal.attach(model, foveal.get_method(method) | note):
        model(ids)
    for a, b in want:
        assert b == pytest.approx(a, abs=1e-4)
        assert 0.2 * a[3] < a[0] < a[3] and a[1] < a[2] < a[3]


def test_an_exact_choice_finds_everything(model, ids):
    exact = hook(select=lambda step: Lists(step.scores().topk(9, -1).indices.sort(-1).values))
    probe = sums(model, ids, exact)
    assert len(probe.sums) == 2 and all(d < 0.3 for d in probe.density)
    for recall, weight, best, n in probe.sums:
        assert recall == pytest.approx(n.item()) and weight == pytest.approx(best.item())

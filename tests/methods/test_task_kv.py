"""Task-KV against a plain computation: which heads stay whole, what the others keep, and that the budget is met exactly."""

import math

import pytest
import torch
from models import tiny
from reference import causal, watch, weights

import foveal
from foveal.methods.keep.task_kv import TaskKV

N, PROMPT, HEADS = 64, 60, 6


@pytest.fixture(scope="module")
def model():
    """Every query head has its own KV head, so that there are heads to choose from."""
    return tiny("llama", num_hidden_layers=3, num_key_value_heads=6)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(17))


def expected(s, n, count, m):
    """(heads that stay whole, kept token ids of each KV head) with `count` whole heads."""
    kv = s.k.shape[0]
    cut = type(s)(s.q[:, :n], s.k[:, :n], s.v[:, :n], s.out[:, :n])
    c = weights(cut, causal(n)[None])[:, n - m.window :].mean(1).unflatten(0, (kv, -1)).mean(1)
    summaries = []
    for g in range(kv):
        best = sorted(range(n), key=lambda j: -c[g, j].item())[: m.top]
        summaries.append(sum(c[g, j] * s.v[g, j] for j in best))
    centre = sum(summaries) / kv
    far = sorted(range(kv), key=lambda g: -(summaries[g] - centre).square().sum().sqrt().item())
    whole = set() if count == 0 else {far[0]} if count == 1 else {*far[: count - 1], far[-1]}
    budget = kv * (m.budget if isinstance(m.budget, int) else math.ceil(m.budget * n))
    left = budget - count * n
    kept, sizes = [], []
    for g in range(kv):
        if g in whole:
            kept.append(list(range(n)))
            continue
        near = torch.nn.functional.pad(c[g], (m.kernel // 2,) * 2).unfold(0, m.kernel, 1).mean(-1)
        sizes.append(left // (kv - count))
        middle = sorted(range(m.sink, n - m.recent), key=lambda j: -near[j].item())
        kept.append((middle, near))
    return whole, kept, left


@pytest.mark.parametrize(
    ("method", "wholes"),
    [
        (TaskKV(0.6, share=0.5, least=1, window=8, top=16, sink=2, recent=6), (3, 2, 1)),
        (TaskKV(36, share=1 / 3, least=2, window=12, top=5, sink=0, recent=4, kernel=3), (2, 2, 2)),
        (TaskKV(0.4, share=0.0, least=0, window=8, sink=3, recent=9), (0, 0, 0)),
        (
            TaskKV(0.5, share=0.9, least=0, window=8, sink=3, recent=9),
            (2, 2, 0),
        ),  # more would not leave half to the others
    ],
)
def test_far_heads_stay_whole_and_the_others_keep_their_three_parts(method, wholes, model, ids):
    seen = watch(model, method, ids, (PROMPT,))
    for b, layer, s in seen.each():
        rows = seen.kept[0][layer][b]
        whole, kept, left = expected(s, PROMPT, wholes[layer], method)
        assert {g for g, row in enumerate(rows) if len(row) == PROMPT} == whole
        assert sum(len(row) for g, row in enumerate(rows) if g not in whole) == left
        for g, row in enumerate(rows):
            if g in whole:
                continue
            assert abs(len(row) - left / (HEADS - len(whole))) < 1
            safe = {*range(method.sink), *range(PROMPT - method.recent, PROMPT)}
            assert safe <= set(row)
            middle, near = kept[g]
            got = sorted(near[j].item() for j in set(row) - safe)
            assert got == pytest.approx(sorted(near[j].item() for j in middle[: len(got)]), abs=1e-6)
        assert seen.kept[-1][layer][b] == [[*row, *range(PROMPT, N)] for row in rows]


def test_what_does_not_fit_is_taken_from_the_newest(model, ids):
    seen = watch(model, TaskKV(12, share=0.0, least=0, window=8, sink=4, recent=30), ids, (PROMPT,))
    rows = {tuple(row) for layer in seen.kept[0] for heads in layer for row in heads}
    assert rows == {(0, 1, 2, 3, *range(52, 60))}


def test_the_ramp_over_layers(model):
    with foveal.attach(model, TaskKV(0.5, share=1.0, least=2)) as session:
        assert [session.active[i][0].plan for i in range(3)] == [{0: 6, 1: 4, 2: 2}] * 3


def test_permuting_heads_permutes_the_choice():
    values = torch.randn(1, 5, 40, 8)
    looked = torch.rand(1, 5, 40)
    order = torch.tensor([3, 0, 4, 1, 2])
    task = TaskKV(top=7)
    far = task.distances(looked, values)
    assert torch.allclose(task.distances(looked[:, order], values[:, order]), far[:, order], atol=1e-6)
    same = values[:, :1].expand(-1, 5, -1, -1)
    assert task.distances(looked[:, :1].expand(-1, 5, -1), same).abs().max() < 1e-6  # alike heads: nobody stands apart


def test_query_heads_of_a_kv_head_count_in_the_mean(ids):
    model = tiny("llama", num_hidden_layers=1, num_key_value_heads=3)
    method = TaskKV(0.6, window=8, top=16, sink=2, recent=6)
    seen = watch(model, method, ids, (PROMPT,))
    for b, layer, s in seen.each():
        whole, _, _ = expected(s, PROMPT, 1, method)
        assert {g for g, row in enumerate(seen.kept[0][layer][b]) if len(row) == PROMPT} == whole


def test_bad_values():
    for wrong, message in (
        ({"kernel": 2}, "kernel = 2"),
        ({"recent": 0}, "recent = 0"),
        ({"share": 1.2}, "share = 1.2"),
    ):
        with pytest.raises(foveal.InputError, match=message):
            TaskKV(**wrong)

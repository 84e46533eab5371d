"""Choices by score against plain loops, and what must hold of any choice."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.errors import InputError
from foveal.ops.route import which
from foveal.ops.scores import pooled_scores
from foveal.ops.top import top_blocks, top_slots


def plain_map(scores, *, k=None, mass=None, threshold=None, per="row", normalize="softmax", size=1, past=0,
              keep_first=0, keep_last=0, diagonal=True, causal=True):  # fmt: skip
    """top_blocks by loops over one list after another, with Python's stable sort."""
    heads, nq, nk = scores.shape[1:]
    query_block, key_block = size if isinstance(size, tuple) else (size, size)
    allowed, forced = torch.zeros(nq, nk, dtype=torch.bool), torch.zeros(nq, nk, dtype=torch.bool)
    newest = []
    for a in range(nq):
        own = {t // key_block for t in range(past + a * query_block, past + (a + 1) * query_block)} & set(range(nk))
        stop = max(own) + 1 if causal else nk
        newest.append(max(own))
        allowed[a, :stop] = True
        forced[a, :keep_first] = True
        forced[a, max(0, stop - keep_last) : stop] = True
        forced[a, sorted(own)] |= diagonal
    forced &= allowed
    x = scores.double().masked_fill(~allowed, -math.inf)
    if normalize == "softmax":
        weights = x.softmax(-1).nan_to_num(0.0)
    else:
        weights = x.clamp(min=0) / x.clamp(min=0).sum(-1, keepdim=True).clamp(min=1e-300)
    must_be = forced.expand_as(x).flatten().tolist()
    x, weights = x.flatten().tolist(), weights.flatten().tolist()
    together = {"row": nk, "head": nq * nk, "map": heads * nq * nk}[per]
    out = set()
    for number, start in enumerate(range(0, len(x), together)):
        one = range(start, start + together)
        must = [c for c in one if must_be[c]]
        rest = [c for c in one if not must_be[c] and x[c] > -math.inf]
        rank = weights if mass is not None else x
        rest.sort(key=lambda c: -rank[c])
        if threshold is not None:
            rest = [c for c in rest if x[c] >= threshold]
        elif k is not None:
            count = k if isinstance(k, int) else k.flatten()[number].item()
            rest = rest[: max(0, count - len(must))]
        elif mass < 1:
            goal = mass * sum(weights[c] for c in one) * (1 - 1e-6)
            have, taken = sum(weights[c] for c in must), 0
            while taken < len(rest) and have < goal:
                have, taken = have + weights[rest[taken]], taken + 1
            rest = rest[:taken]
        out.update(must + rest)
    for number, start in enumerate(range(0, len(x), nk)):
        if out.isdisjoint(range(start, start + nk)):
            row = x[start : start + nk]
            out.add(start + (row.index(max(row)) if max(row) > -math.inf else newest[number % nq]))
    return torch.tensor([c in out for c in range(len(x))]).view(scores.shape)


def scores_of(kind, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "ties":
        x = x.round()
    if kind == "hidden":
        x = x.masked_fill(torch.rand(shape, generator=g) < 0.4, -math.inf)
        x[0, 0, 1] = -math.inf
    return x


@pytest.mark.parametrize("kind", ["plain", "ties", "hidden"])
@pytest.mark.parametrize("per", ["row", "head", "map"])
@pytest.mark.parametrize(
    "rule", [{"k": 1}, {"k": 4}, {"k": 1000}, {"mass": 0.3}, {"mass": 0.9}, {"mass": 1}, {"threshold": 0.5}]
)
def test_maps(rule, per, kind):
    x = scores_of(kind, (2, 3, 7, 7))
    for extra in (
        {},
        {"diagonal": False},
        {"keep_first": 2, "keep_last": 3},
        {"causal": False, "keep_last": 1, "diagonal": False},
        {"causal": False},
    ):
        assert torch.equal(top_blocks(x, per=per, **rule, **extra), plain_map(x, per=per, **rule, **extra)), extra


@pytest.mark.parametrize("rule", [{"k": 3}, {"mass": 0.5}, {"threshold": 0.0}])
@pytest.mark.parametrize(
    ("nq", "nk", "where"),
    [
        (3, 12, {"size": (8, 2)}),
        (6, 3, {"size": (4, 8)}),
        (3, 7, {"past": 4}),
        (2, 3, {"size": 4, "past": 5}),
        (1, 9, {"past": 8}),
    ],
)
def test_maps_that_are_not_square(rule, nq, nk, where):
    x = scores_of("plain", (1, 2, nq, nk))
    for diagonal in (True, False):
        found = top_blocks(x, diagonal=diagonal, keep_first=1, **rule, **where)
        assert torch.equal(found, plain_map(x, diagonal=diagonal, keep_first=1, **rule, **where))


@pytest.mark.parametrize("per", ["row", "head"])
def test_masses_may_be_given(per):
    x = scores_of("plain", (2, 2, 6, 6)).relu()
    found = top_blocks(x, mass=0.7, normalize="sum", per=per)
    assert torch.equal(found, plain_map(x, mass=0.7, normalize="sum", per=per))


@pytest.mark.parametrize(("per", "shape"), [("row", (2, 3, 5)), ("row", (3, 1)), ("head", (2, 3)), ("map", (2,))])
def test_numbers_of_their_own(per, shape):
    x = scores_of("ties", (2, 3, 5, 5))
    k = torch.randint(0, 9, shape)
    full = k.expand({"row": (2, 3, 5), "head": (2, 3), "map": (2,)}[per])
    assert torch.equal(top_blocks(x, k=k, per=per), plain_map(x, k=full, per=per))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_map(data):
    nq = data.draw(st.integers(1, 9))
    past = data.draw(st.integers(0, 5))
    x = scores_of(data.draw(st.sampled_from(["plain", "ties"])), (1, 2, nq, nq + past), data.draw(st.integers(0, 99)))
    options = {
        "per": data.draw(st.sampled_from(["row", "head", "map"])),
        "keep_first": data.draw(st.integers(0, 3)),
        "keep_last": data.draw(st.integers(0, 3)),
        "diagonal": data.draw(st.booleans()),
        "past": past,
    }
    rule = data.draw(st.sampled_from([{"k": 2}, {"k": 5}, {"mass": 0.6}, {"mass": 0.99}, {"threshold": 0.3}]))
    found = top_blocks(x, **rule, **options)
    assert torch.equal(found, plain_map(x, **rule, **options))
    assert found.any(-1).all()
    assert not (found & (torch.ones(nq, nq + past).triu(past + 1) == 1)).any()


def test_pooled_scores_fit():
    q, k = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 77, 8)
    x = pooled_scores(q, k, 16, 8, scale=0.3)
    found = top_blocks(x, k=3, size=(16, 8), past=27, keep_first=1)
    assert torch.equal(found, plain_map(x, k=3, size=(16, 8), past=27, keep_first=1))


def test_maps_refuse():
    x = torch.randn(1, 2, 4, 4)
    for options, words in (
        ({}, "one of k, mass"),
        ({"k": 1, "mass": 0.5}, "one of k, mass"),
        ({"k": 0}, "at least 1"),
        ({"k": torch.ones(1, 2, 4, 4, dtype=torch.int)}, "fits one number"),
        ({"k": torch.ones(2)}, "int k"),
        ({"mass": 0.0}, "mass"),
        ({"mass": 1.5}, "mass"),
        ({"k": 1, "per": "block"}, "per"),
        ({"k": 1, "normalize": "max"}, "normalize"),
        ({"k": 1, "keep_first": -1}, "keep"),
        ({"k": 1, "past": 1}, "key blocks"),
        ({"k": 1, "size": (4, 1)}, "key blocks"),
    ):
        with pytest.raises(InputError, match=words):
            top_blocks(x, **options)
    with pytest.raises(InputError, match="float scores"):
        top_blocks(x[0], k=1)
    assert which("top_blocks", x, k=1).name == "torch"


# ---------------------------------------------------------------------- slots


def plain_slots(scores, k, forced=None, count=None):
    out = []
    for r, row in enumerate(scores.double().tolist()):
        must = [] if forced is None else [i for i, f in enumerate(forced[r].tolist()) if f and row[i] > -math.inf]
        rest = sorted((i for i in range(len(row)) if i not in must and row[i] > -math.inf), key=lambda i: -row[i])
        chosen = sorted((must + rest)[: min(k, k if count is None else count[r].item())])
        out.append(chosen + [-1] * (k - len(chosen)))
    return torch.tensor(out, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "ties", "hidden"])
def test_slots(kind, dtype):
    x = scores_of(kind, (1, 1, 6, 40))[0, 0].to(dtype)
    forced = torch.rand(6, 40) < 0.1
    count = torch.tensor([0, 1, 5, 7, 30, 40])
    for k in (1, 7, 40, 50):
        for f in (None, forced):
            for c in (None, count):
                found = top_slots(x, k, f, count=c)
                assert found.dtype == torch.int32
                assert torch.equal(found, plain_slots(x, k, f, c))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1e-40, 1.5, math.inf]), min_size=1, max_size=30),
    st.integers(1, 12),
)
def test_any_slots(row, k):
    x = torch.tensor([row])
    assert torch.equal(top_slots(x, k), plain_slots(x, k))


def test_slots_refuse():
    x = torch.randn(2, 5)
    for call, words in (
        (lambda: top_slots(x[0], 1), "scores"),
        (lambda: top_slots(x, 0), "at least 1"),
        (lambda: top_slots(x, 1, torch.ones(2, 5)), "forced"),
        (lambda: top_slots(x, 1, count=torch.ones(3, dtype=torch.int)), "count"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    assert top_slots(x[:, :0], 3).tolist() == [[-1] * 3] * 2

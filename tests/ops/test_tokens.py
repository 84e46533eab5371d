"""Attention over listed keys against the full matrix of logits in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.errors import InputError
from foveal.ops import reference, tokens
from foveal.ops.dense import attend
from foveal.ops.route import which
from foveal.ops.tokens import attend_tokens

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def problem(heads, kv_heads, length, total, dtype=torch.float32, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)

    return rand(batch, length, heads, 16), rand(batch, total, kv_heads, 16), rand(batch, total, kv_heads, 12)


def random_lists(batch, lists, nq, m, total, seed=0):
    """Different keys in no order, some of them -1."""
    g = torch.Generator().manual_seed(seed)
    slots = torch.rand(batch, lists, nq, total, generator=g).argsort(-1)[..., :m]
    return slots.masked_fill(torch.rand(slots.shape, generator=g) < 0.3, -1)


def visible(slots, heads, length, total, size, queries):
    """What the lists say, as a mask [batch, heads, length, total]."""
    seen = torch.zeros(*slots.shape[:3], total + 1, dtype=torch.bool).scatter_(3, slots.where(slots >= 0, total), True)
    seen = seen[..., :total].repeat_interleave(size, 2)[:, :, :length].repeat_interleave(heads // slots.shape[1], 1)
    if queries is not None:
        seen = seen & queries.repeat_interleave(heads // queries.shape[1], 1)[..., None]
    return seen


def agrees(found, expected, dtype):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (7, 1), (9, 3)])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 20), (13, 25)])
def test_lists(lengths, heads, kv_heads, dtype, monkeypatch):
    monkeypatch.setattr(tokens, "_GATHERED_NUMBERS", 1500)
    monkeypatch.setattr(tokens, "_ROWS", 4)
    length, total = lengths
    q, k, v = problem(heads, kv_heads, *lengths, dtype)
    for size in {1, 4, length}:
        for lists in {kv_heads, heads}:
            slots = random_lists(2, lists, -(-length // size), min(7, total), total)
            for rows in (None, 1, kv_heads, heads):
                queries = None if rows is None else torch.rand(2, rows, length) < 0.5
                found = attend_tokens(q, k, v, slots, scale=0.3, size=size, queries=queries, need_lse=True)
                mask = visible(slots, heads, length, total, size, queries)
                expected = reference.attend(q, k, v, scale=0.3, visible=mask)
                assert found[0].dtype == dtype
                agrees(found, expected, dtype)
                assert (found[0][~(mask & reference.causal(length, total)).any(-1)] == 0).all()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", ["softcap", "sinks", "bias", "mass"])
def test_shared_keywords(name, per_head):
    q, k, v = problem(6, 2, 11, 17)
    heads = 6 if per_head else 2
    given_ = {
        "softcap": 1.5,
        "sinks": torch.randn(6),
        "bias": (torch.randn(2, 6, 11, 3), torch.randn(2, heads, 17, 3)),
        "mass": torch.randint(0, 4, (2, heads, 17)).float(),
    }[name]
    slots = random_lists(2, 2, 3, 9, 17)
    found = attend_tokens(q, k, v, slots, scale=0.3, size=4, need_lse=True, **{name: given_})
    mask = visible(slots, 6, 11, 17, 4, None)
    agrees(found, reference.attend(q, k, v, scale=0.3, visible=mask, **{name: given_}), torch.float32)


def test_all_keys_is_dense():
    q, k, v = problem(6, 3, 10, 25)
    every = torch.arange(25).expand(2, 3, 1, 25)
    found = attend_tokens(q, k, v, every, scale=0.3, size=10, need_lse=True)
    agrees(found, [t.double() for t in attend(q, k, v, scale=0.3, need_lse=True)], torch.float32)


def test_a_key_listed_twice_counts_twice():
    q, k, v = problem(2, 1, 3, 5)
    twice, mass = torch.tensor([0, 1, 1]), torch.tensor([1.0, 2, 0, 0, 0])
    found, _ = attend_tokens(q, k, v, twice.expand(2, 1, 3, 3), scale=0.3)
    expected, _ = reference.attend(q, k, v, scale=0.3, mass=mass.expand(2, 1, 5))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_slots_past_the_end_are_later_keys():
    q, k, v = problem(2, 1, 3, 5)
    found = attend_tokens(q, k, v, torch.tensor([5, 0, 900]).expand(2, 1, 3, 3), scale=0.3, need_lse=True)
    agrees(found, reference.attend(q, k, v, scale=0.3, visible=torch.arange(5) == 0), torch.float32)


def test_chosen_queries_over_chosen_keys_are_attention_on_the_short_sequence():
    """Token Sparse: gather queries and keys of the same tokens, attend densely, scatter."""
    q, k, v = problem(4, 4, 30, 30, torch.float64)
    slots = torch.rand(2, 4, 30).argsort(-1)[..., :13].sort(-1).values
    queries = torch.zeros(2, 4, 30, dtype=torch.bool).scatter_(2, slots, True)
    found, _ = attend_tokens(q, k, v, slots[:, :, None], scale=0.3, size=30, queries=queries)
    short = [t.gather(2, slots[..., None].expand(-1, -1, -1, t.shape[3])) for t in (q, k, v)]
    out, _ = attend(*short, scale=0.3)
    expected = out.new_zeros(found.shape).scatter_(2, slots[..., None].expand_as(out), out)
    torch.testing.assert_close(found, expected)


def test_gradients():
    q, k, v = (t.requires_grad_() for t in problem(4, 2, 6, 9, torch.float64, batch=1))
    slots = random_lists(1, 2, 3, 5, 9)
    queries = torch.rand(1, 4, 6) < 0.7
    mask = visible(slots, 4, 6, 9, 2, queries)
    found = attend_tokens(q, k, v, slots, scale=0.3, size=2, queries=queries, need_lse=True)
    expected = reference.attend(q, k, v, scale=0.3, visible=mask)
    weights = torch.randn(found[0].shape, dtype=torch.float64), torch.randn(found[1].shape, dtype=torch.float64)

    def loss(pair):
        return (pair[0] * weights[0]).sum() + (pair[1].masked_fill(pair[1] == -math.inf, 0.0) * weights[1]).sum()

    ours = torch.autograd.grad(loss(found), (q, k, v))
    # The full matrix has logsumexp of rows of -inf, whose gradient is NaN: those rows are left out.
    live = expected[1] > -math.inf
    theirs = torch.autograd.grad(
        (expected[0] * weights[0]).sum() + (expected[1][live] * weights[1][live]).sum(), (q, k, v)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(0.0) if not live.all() else b)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_lists(data):
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 4, 7]))
    length = data.draw(st.integers(1, 12))
    total = length + data.draw(st.integers(0, 12))
    size, m = data.draw(st.integers(1, 14)), data.draw(st.integers(0, total))
    q, k, v = problem(kv_heads * group, kv_heads, length, total, torch.float64, seed=m)
    slots = random_lists(2, kv_heads, -(-length // size), m, total, seed=size)
    queries = torch.rand(2, 1, length) < data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    found = attend_tokens(q, k, v, slots, scale=0.3, size=size, queries=queries, need_lse=True)
    mask = visible(slots, kv_heads * group, length, total, size, queries)
    agrees(found, reference.attend(q, k, v, scale=0.3, visible=mask), torch.float64)


def test_refusals():
    q, k, v = problem(4, 2, 6, 8)
    slots = torch.zeros(2, 2, 6, 3, dtype=torch.int32)
    for change, words in (
        ({"slots": slots[:, :1].expand(2, 3, 6, 3)}, "slots"),
        ({"slots": slots[:, :, :5]}, "slots"),
        ({"slots": slots.float()}, "slots"),
        ({"size": 0}, "block size"),
        ({"queries": torch.ones(2, 1, 6)}, "queries"),
        ({"queries": torch.ones(2, 3, 6, dtype=torch.bool)}, "queries"),
    ):
        with pytest.raises(InputError, match=words):
            attend_tokens(q, k, v, change.pop("slots", slots), scale=1.0, **change)
    assert which("attend_tokens", q, k, v, slots, scale=1.0) == ("torch", "the tensors are on cpu")

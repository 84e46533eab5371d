"""Votes on cached keys, attention by rank and the least of a list, against the definitions written out key by key in float64."""

import math

import pytest
import torch

from foveal import ops
from foveal.errors import InputError
from foveal.ops.pages import Pages
from foveal.ops.ragged import Logit
from foveal.ops.scores import pool_newest
from foveal.ops.votes import Kept, Turn

BATCH, KV, GROUP, DIM = 2, 2, 3, 16
FREQUENCY = 10000.0 ** (-torch.arange(8) / 8)


def make(lengths=(40, 23), seed=0):
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor([n for n in lengths for _ in range(KV)], dtype=torch.int32)
    table = torch.randperm(BATCH * KV * 5, generator=g).int().view(BATCH * KV, 5)
    key, value = torch.randn(2, BATCH * KV * 5, 8, DIM, generator=g).double()
    return torch.randn(BATCH * KV, GROUP, DIM, generator=g).double(), Pages(key, value, table, length, 40)


def key_of(pages, row, slot, name="key"):
    return getattr(pages, name)[pages.table[row, slot // 8], slot % 8]


def turned(x, by):
    a, b, angle = x[:8], x[8:], by * FREQUENCY.double()
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def weights(q, pages, row, slots, scale=1.0, cap=None, stand=None):
    """[group, slots]"""
    own = int(pages.length[row]) - 1
    keys = [key_of(pages, row, s) if stand is None else turned(key_of(pages, row, s), -s) for s in slots]
    z = torch.stack([torch.stack([(x if stand is None else turned(x, stand - own)) @ k for k in keys]) for x in q[row]])
    z = z * scale
    return (z if cap is None else cap * torch.tanh(z / cap)).softmax(-1)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("share", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    ("middle", "own", "stand", "cap"), [(False, True, None, 2.0), (True, False, 9, None), (False, False, None, None)]
)
def test_the_chosen_have_the_most_votes(whole, share, middle, own, stand, cap):
    q, pages = make()
    sink, recent, k = 3, 4, 15
    slots, found = ops.vote_slots(
        q, pages, Logit(0.4, cap), k, kv_heads=KV, whole=whole, share=share, sink=sink, recent=recent, middle=middle, own=own,
        turn=None if stand is None else Turn(FREQUENCY, stand),
    )  # fmt: skip
    lists = [[b * KV + g for g in range(KV)] for b in range(BATCH)] if whole else [[r] for r in range(BATCH * KV)]
    assert slots.dtype == torch.int32 and slots.shape == (len(lists), k)
    for rows, got, n in zip(lists, slots.tolist(), found.tolist(), strict=True):
        length = int(pages.length[rows[0]])
        offered = range(sink, length - recent) if middle else range(length)
        w = torch.cat([weights(q, pages, r, offered, 0.4, cap, stand) for r in rows])
        score = dict(zip(offered, w.amax(0) if share == "max" else getattr(w, share)(0), strict=True))
        forced = [s for s in range(length - (not own)) if s < sink or s >= length - recent]
        rest = sorted((s for s in offered if s not in forced and s < length - (not own)), key=lambda s: -score[s])
        expected = sorted(forced + rest[: k - len(forced)])
        assert got == expected + [-1] * (k - len(expected)) and n == len(expected)


def test_each_sequence_has_its_own_ends_and_budget():
    q, pages = make()
    each = {"sink": torch.tensor([5, 1]), "recent": torch.tensor([2, 7]), "count": torch.tensor([20, 3])}
    together, found = ops.vote_slots(q, pages, Logit(0.3), 20, kv_heads=KV, **each)
    assert found.tolist() == [20, 3]
    for b in range(BATCH):
        alone = {"sink": int(each["sink"][b]), "recent": int(each["recent"][b])}
        one = ops.vote_slots(q, pages, Logit(0.3), int(each["count"][b]), kv_heads=KV, **alone)[0][b]
        assert torch.equal(together[b][: len(one)], one) and (together[b][len(one) :] == -1).all()


def test_marks_stand_in_for_votes():
    q, pages = make()
    marks = torch.zeros(BATCH * KV, 40, dtype=torch.bool)
    marks[:, [7, 11, 12]] = True
    kept = Kept(torch.tensor([True, False]), marks)
    how = {"kv_heads": KV, "sink": 1, "recent": 2}
    got, found = ops.vote_slots(q, pages, Logit(0.3), 9, kept=kept, **how)
    assert got[0].tolist() == [0, 7, 11, 12, 38, -1, -1, -1, -1] and found.tolist() == [
        5,
        9,
    ]  # the newest is not offered
    assert torch.equal(got[1], ops.vote_slots(q, pages, Logit(0.3), 9, **how)[0][1])


def test_renumbered_attention_is_attention_at_ranks():
    q, pages = make()
    slots = torch.tensor([[2, 3, 17, 30], [0, 5, -1, -1]], dtype=torch.int32)
    sinks = torch.randn(BATCH * KV, GROUP).double()
    out = ops.attend_renumbered(q, pages, Logit(0.5, None, sinks), slots, torch.tensor([4, 2]), FREQUENCY, kv_heads=KV)
    for row in range(BATCH * KV):
        own = int(pages.length[row]) - 1
        read = [s for s in slots[row // KV].tolist() if s >= 0] + [own]
        keys = torch.stack([turned(key_of(pages, row, s), rank - s) for rank, s in enumerate(read)])
        values = torch.stack([key_of(pages, row, s, "value") for s in read])
        for g in range(GROUP):
            z = turned(q[row, g], len(read) - 1 - own) @ keys.T * 0.5
            w = torch.cat([z, sinks[row, g, None]]).softmax(-1)[:-1]
            assert torch.allclose(out[row, g], w @ values, atol=1e-6)  # turning is done in float32


@pytest.mark.parametrize("share", ["max", "mean"])
def test_the_least_of_a_full_list_leaves(share):
    q, pages = make()
    marks = torch.zeros(BATCH * KV, 40, dtype=torch.bool)
    marks[:, [1, 4, 9, 20]] = True
    marks[1, 4] = False
    slots = ops.marked_slots(marks, 6)
    for allowed in (4, torch.tensor([5, 3])):
        got = marks.clone()
        ops.drop_least(q, pages, Logit(0.4), slots, got, allowed, kv_heads=KV, share=share)
        for row in range(BATCH * KV):
            listed = [*marks[row].nonzero().flatten().tolist(), int(pages.length[row]) - 1]
            w = weights(q, pages, row, listed, 0.4)
            w = w.amax(0) if share == "max" else w.mean(0)
            if len(listed) > (allowed if isinstance(allowed, int) else allowed[row // KV]):
                listed.remove(listed[int(w.argmin())])
            assert got[row].nonzero().flatten().tolist() == listed


def test_the_newest_page_is_pooled_anew():
    _, pages = make((40, 23))
    pages.length[3] = 0
    pooled = {kind: torch.full((BATCH * KV, 10, DIM), 5.0).double() for kind in ("min", "max", "mean")}
    pool_newest(pages, "key", 4, pooled)
    for row, (page, held) in enumerate([(9, range(36, 40)), (9, range(36, 40)), (5, range(20, 23))]):
        keys = torch.stack([key_of(pages, row, s) for s in held])
        for kind, expected in (("min", keys.amin(0)), ("max", keys.amax(0)), ("mean", keys.mean(0))):
            assert torch.allclose(pooled[kind][row, page], expected)
            assert (pooled[kind][row, [p for p in range(10) if p != page]] == 5).all()
    assert all((x[3] == 5).all() for x in pooled.values())


def test_what_does_not_fit_is_named():
    q, pages = make()
    marks = torch.zeros(BATCH * KV, 40)
    wrong = [
        (lambda: ops.vote_slots(q[:3], pages, Logit(1.0), 3, kv_heads=KV), "expected q"),
        (lambda: ops.vote_slots(q, pages, Logit(1.0), 0, kv_heads=KV), "k of at least 1"),
        (lambda: ops.vote_slots(q, pages, Logit(1.0), 3, kv_heads=KV, share="least"), "share in"),
        (lambda: ops.vote_slots(q, pages, Logit(1.0), 3, kv_heads=KV, sink=torch.ones(2)), "sink and recent"),
        (lambda: ops.vote_slots(q, pages, Logit(1.0), 3, kv_heads=KV, turn=Turn(FREQUENCY[:3], 2)), "frequencies"),
        (lambda: ops.vote_slots(q, pages, Logit(1.0), 3, kv_heads=KV, whole=False, kept=Kept(q, q)), "whole=True"),
        (lambda: ops.attend_renumbered(q, pages, Logit(1.0), torch.ones(3, 2), torch.ones(2), FREQUENCY, kv_heads=KV), "expected slots"),
        (lambda: ops.drop_least(q, pages, Logit(1.0), torch.ones(4, 2), marks, 3, kv_heads=KV), "marks bool"),
        (lambda: ops.marked_slots(marks, 3), "expected a mask bool"),
        (lambda: ops.marked_slots(marks > 0, 0), "at least 1 slot"),
        (lambda: pool_newest(pages, "token", 4, {"min": marks}), "expected 'key' or 'value'"),
        (lambda: ops.top_slots(marks, 3, unit=0), "a unit of at least 1"),
        (lambda: ops.page_bound(q, marks[:, None], marks[:, None], size=0), "expected q|size"),
    ]  # fmt: skip
    for call, message in wrong:
        with pytest.raises(InputError, match=message):
            call()
    assert math.isfinite(ops.vote_slots(q, pages, Logit(1.0), 60, kv_heads=KV)[0].float().sum())  # more than there are
    assert ops.which("vote_slots", q, pages, Logit(1.0), 3, kv_heads=KV).name == "torch"

"""Eviction in one launch, in Triton's interpreter, against naming a slot and dropping it; masses by token against a scatter."""

import pytest
import torch

from foveal.edits import Keep, Leave, Plane
from foveal.ops import leave as op
from foveal.ops.gpu import leave as gpu
from foveal.ops.gpu.ragged import Wanted, launch
from foveal.ops.paged_attention import attend_ragged
from foveal.ops.ragged import Logit
from foveal.store import FAR, LayerStore, Layout

HEADS, BATCH = 3, 2
LENGTHS = ((70, 1, 33), (64, 96, 5))


def filled(specs=None, layout=None, dim=64, dtype=torch.float32, seed=0, lengths=LENGTHS) -> LayerStore:
    """Rows of these lengths whose tokens are in no order, the newest last, with planes of random numbers."""
    store, g = LayerStore(specs, layout or Layout(paged=True)), torch.Generator().manual_seed(seed)
    n = max(map(max, lengths))
    key, value = torch.randn(2, BATCH, HEADS, n, dim, generator=g).to(dtype)
    store.append(key[:, :, :-1], value[:, :, :-1], 0)
    want = torch.tensor(lengths)[..., None] - 1
    store.apply(Keep(mask=store.token >= n - 1 - want))
    for _ in range(20):  # swap-removal and appending mix the slots
        store.append(key[:, :, -1:], value[:, :, -1:], torch.full((BATCH,), n - 1))
        slot = (torch.rand(BATCH, HEADS, generator=g) * store.len).long()
        token = store.token.gather(2, slot[..., None])[..., 0]
        store.apply(Keep(drop=slot.where(token < n - 1, -1), optional=True))
        n += 1
        store.append(key[:, :, :1], value[:, :, :1], torch.full((BATCH,), n - 1))
        n += 1
    for name in store.specs:
        store.set(name, torch.rand(BATCH, HEADS, store.T, generator=g) + 0.5)
    return store


def state(store: LayerStore) -> list[dict[int, tuple]]:
    """What each row holds, by token id."""
    rows, c = [], store.classes[0]
    names = ["key", "value", *store.specs]
    read = {name: c.read(name) for name in names}
    for row, n in enumerate(c.pool.length.tolist()):
        token = c.planes["token"][row]
        assert (token[:n] != FAR).all() and (token[n:] == FAR).all()
        for name in store.specs:
            assert (c.planes[name][row, n:] == store.fills[name]).all()
        rows.append({int(token[i]): tuple(read[x][row, i] for x in names) for i in range(n)})
    return rows


def compare(make, rule: Leave, tolerance: float = 0.0) -> int:
    """The kernel on one store, slots and drops on its twin; how many keys left."""
    one, two = make(), make()
    newest = torch.full((BATCH, 1), int(one.token.where(one.token != FAR, -1).max()))
    heads = None if rule.heads is None else one.named(rule.heads)
    before = sum(one.classes[0].pool.length.tolist())
    left = gpu.launch(one.classes[0].leaving(rule, HEADS, heads))
    score = None if rule.score is None else two.plane(rule.score)
    if rule.by_token is not None:
        at = two.token.clamp(max=rule.by_token.shape[1] - 1).long()
        score = rule.by_token[:, None].expand(-1, HEADS, -1).gather(2, at)
    how = {"after": rule.after, "recent": rule.recent, "score": score, "fold": rule.fold}
    slot, into = op.leaver(two.token, newest, **how)
    slot = slot.where(two.len > rule.allowed, -1)
    if rule.gone is not None:
        hit = two.token == rule.gone[:, None, None]
        slot = hit.int().argmax(-1).where(hit.any(-1) & (rule.gone[:, None] >= 0), slot)
    told = two.token.gather(2, slot.clamp(min=0)[..., None])[:, 0, 0].where(slot[:, 0] >= 0, -1)
    two.apply(Keep(drop=slot, heads=rule.heads, into=into, optional=True))
    for a, b in zip(state(one), state(two), strict=True):
        assert a.keys() == b.keys()
        for token, parts in a.items():
            for x, y in zip(parts, b[token], strict=True):
                torch.testing.assert_close(x.float(), y.float(), rtol=tolerance, atol=tolerance)
    pages = [s.classes[0] for s in (one, two)]
    n = int(pages[0].top)
    assert n == int(pages[1].top) and sorted(pages[0].free[:n].tolist()) == sorted(pages[1].free[:n].tolist())
    if left is not None:
        assert left.tolist() == told.tolist()
    return before - sum(pages[0].pool.length.tolist())


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize(
    "rule",
    [
        Leave(40),
        Leave(40, after=100),
        Leave(4, heads=(0, 2)),
        Leave(torch.tensor([[40], [80]])),
        Leave(torch.tensor([[500, 4, 4], [4, 500, 500]])),
    ],
)
def test_the_oldest_leaves(rule, dim):
    assert 0 < compare(lambda: filled(dim=dim), rule) < BATCH * HEADS


def test_nobody_leaves_rows_that_have_room():
    assert compare(filled, Leave(200)) == 0


@pytest.mark.parametrize("recent", [0, 1, 10, torch.tensor([[3], [40]])])
def test_the_least_scored_leaves(recent):
    specs = {"score": Plane(0.0), "mass": Plane(1.0)}
    assert compare(lambda: filled(specs, seed=1), Leave(30, "score", after=3, recent=recent)) > 2


def test_of_equal_scores_the_first_slot_and_infinities():
    def make():
        store = filled({"score": Plane(0.0)}, seed=2)
        x = store.plane("score").round()
        x[0, 0, 3], x[1, 1, 2:8], x[1, 0] = -torch.inf, torch.inf, -0.0
        x[1, 0, 5] = 0.0
        store.set("score", x)
        return store

    assert compare(make, Leave(4, "score")) > 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_what_leaves_is_folded_into_the_oldest(dtype, tolerance):
    make = lambda: filled({"mass": Plane(1.0)}, dtype=dtype, seed=3)
    for rule in (Leave(30, fold=True, heads=(0, 1)), Leave(4, after=90, fold=True), Leave(30, fold=True, recent=50)):
        assert compare(make, rule, tolerance) > 0


def test_a_token_that_is_gone_elsewhere_leaves_first():
    specs, even = {"importance": Plane(0.0)}, ((50, 50, 50), (80, 80, 80))

    def make():  # all heads of a sequence hold the same tokens in the same slots
        store, g = LayerStore(specs, Layout(paged=True)), torch.Generator().manual_seed(5)
        key, value = torch.randn(2, BATCH, HEADS, 80, 64, generator=g)
        store.append(key, value, 0)
        store.apply(Keep(mask=store.token >= 80 - torch.tensor(even)[..., None]))
        return store

    total = torch.rand(BATCH, 90, generator=torch.Generator().manual_seed(6))
    for gone, leave in ((None, 6), ([-1, -1], 6), ([40, 2], 6), ([3, -1], 6), ([40, -1], 6)):
        gone = None if gone is None else torch.tensor(gone, dtype=torch.int32)
        assert compare(make, Leave(49, by_token=total, gone=gone)) == leave
    gone = torch.tensor([40, -1], dtype=torch.int32)
    assert compare(make, Leave(FAR, by_token=total, gone=gone)) == 3


@pytest.mark.parametrize("layout", [Layout(format="int8"), Layout(format="int4", residual=32), Layout(format="fp8")])
def test_codes_and_their_window_move_along(layout):
    assert compare(lambda: filled({"score": Plane(0.0)}, layout, dtype=torch.bfloat16), Leave(30, "score")) > 3


def test_long_rows_take_several_tiles():
    lengths = ((gpu.TILE + 300, 40, 2 * gpu.TILE + 1), (7, gpu.TILE, 100))
    make = lambda: filled({"mass": Plane(1.0)}, lengths=lengths, dim=16)
    assert compare(make, Leave(90)) > 3
    assert compare(make, Leave(90, "mass", recent=5)) > 3
    assert compare(make, Leave(90, after=20, fold=True), 1e-6) > 3


def test_masses_are_added_by_token():
    g = torch.Generator().manual_seed(0)
    token = torch.stack([torch.randperm(1200, generator=g) for _ in range(2)]).repeat_interleave(HEADS, 0).int()
    length = torch.tensor([1100] * HEADS + [37] * HEADS, dtype=torch.int32)
    mass, total = torch.rand(6, 1150, generator=g), torch.rand(2, 1201, generator=g)
    expected, start = total.clone(), total.clone()
    op.add_by_token(expected, mass, token[:, :1150], length, HEADS)
    gpu.add_by_token(total, mass, token, length, HEADS)
    assert (expected - total).abs().max() < 1e-5
    by_hand = sum(float(mass[h, 5]) for h in range(HEADS))
    assert abs(float((expected - start)[0, token[0, 5]]) - by_hand) < 1e-5
    assert (expected == start).sum() == 1201 - 1100 + 1201 - 37


@pytest.mark.parametrize("group", [1, 3, 4])
def test_weights_below_uniform_are_counted_for_the_group(group):
    """A row of one key has a tie, and a tie is not low."""
    q, k = torch.randn(3, group, 64), torch.randn(3, 600, 64)
    store = LayerStore(None, Layout(paged=True))
    store.append(k[None], k[None], 0)
    store.apply(Keep(mask=store.token < torch.tensor([600, 1, 70])[:, None]))
    view = store.classes[0].view
    out, _, low = launch(q, view.key, view.value, view.table, view.length, view.bound, 0.2, want=Wanted(low=True))
    for row, n in enumerate((600, 1, 70)):
        w = (q[row].double() @ k[row, :n].double().mT * 0.2).softmax(-1)
        assert (low[row, :n] == (w < (1 - 1e-5) / n).sum(0)).all() and (low[row, n:] == 0).all()
        assert ((w @ k[row, :n].double()) - out[row]).abs().max() < 1e-4
    assert low[0].sum() > 600 * group / 2 and low[1, 0] == 0
    plain = attend_ragged(q, view, Logit(0.2), want="low")
    assert torch.equal(plain.weights.float(), low)

"""The ragged store against a list of lists: whatever happens to a store, every row holds just the keys it should."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.edits import Keep, Plane
from foveal.errors import InputError
from foveal.rows import FAR
from foveal.store import LayerStore, Layout

D = 4
PLANES = {"score": Plane(0.5), "mass": Plane(1.0), "shift": Plane(0, torch.int32), "wide": Plane(-1.0, width=(2,))}


class Key:
    """One key of the model: what the store should hold in one slot."""

    def __init__(self, token: int, key: torch.Tensor, value: torch.Tensor):
        self.token, self.key, self.value = token, key, value
        self.planes = {n: torch.full(p.width, p.fill, dtype=torch.float64) for n, p in PLANES.items()}

    def copy(self) -> "Key":
        new = Key(self.token, self.key, self.value)
        new.planes = {n: x.clone() for n, x in self.planes.items()}
        return new


LENGTHS, PAGES = Layout(paged=False), Layout(paged=True)


class Naive:
    """The specification: `rows[sequence][head]` is a list of keys in slot order."""

    def __init__(self, rows: list[list[list[Key]]] | None = None, counts: list[int] | None = None):
        self.rows, self.counts = rows or [], counts or []

    def each(self):
        return ((b, h, row) for b, heads in enumerate(self.rows) for h, row in enumerate(heads))

    def append(self, key: torch.Tensor, value: torch.Tensor, first: list[int]) -> None:
        if not self.rows:
            self.rows = [[[] for _ in range(key.shape[1])] for _ in range(key.shape[0])]
        for b, h, row in self.each():
            row += [Key(first[b] + i, key[b, h, i], value[b, h, i]) for i in range(key.shape[2])]
        self.counts = [n + key.shape[2] for n in first]

    def drop(self, slot: torch.Tensor, heads: set[int], renumber: bool) -> None:
        for b, h, row in self.each():
            i = int(slot[b, h])
            if h in heads and i >= 0:
                gone = row[i]
                for k in row:
                    k.planes["shift"] += renumber and k.token < gone.token
                row[i] = row[-1]
                row.pop()

    def mask(self, mask: torch.Tensor, renumber: bool) -> None:
        for b, h, row in self.each():
            gone = [k.token for i, k in enumerate(row) if not mask[b, h, i]]
            row[:] = [k for i, k in enumerate(row) if mask[b, h, i]]
            for k in row:
                k.planes["shift"] += renumber * sum(t > k.token for t in gone)

    def fold(self, into: torch.Tensor, leaving: dict[tuple[int, int], list[int]]) -> None:
        for b, h, row in self.each():
            slots = leaving.get((b, h), [])
            if slots:
                members = [row[i] for i in (int(into[b, h]), *slots)]
                mass = sum(k.planes["mass"] for k in members)
                key, value = (sum(k.planes["mass"] * getattr(k, x) for k in members) / mass for x in ("key", "value"))
                target = members[0]
                target.key, target.value, target.planes["mass"] = key, value, mass

    def take(self, sequences: list[int]) -> "Naive":
        rows = [[[k.copy() for k in row] for row in self.rows[s]] for s in sequences]
        return Naive(rows, [self.counts[s] for s in sequences])


def check(store: LayerStore, naive: Naive) -> None:
    """Every slot of every row, and everything the store says about itself."""
    B, G = len(naive.rows), len(naive.rows[0])
    assert (store.batch, store.heads) == (B, G)
    lengths = torch.tensor([[len(row) for row in heads] for heads in naive.rows])
    assert torch.equal(store.len, lengths)
    assert lengths.max() <= store.T
    assert torch.equal(store.valid, torch.arange(store.T) < lengths[..., None])
    if store.uniform is not None:
        assert (lengths == store.uniform).all()
    for h in range(G):
        assert store.held([h]) is None or (lengths[:, h] == store.held([h])).all()
    planes = {name: store.plane(name) for name in ("key", "value", "token", *PLANES)}
    zeroed = {"key": store.keys(), "value": store.values()}
    for b, h, row in naive.each():
        n = len(row)
        assert planes["token"][b, h].tolist() == [k.token for k in row] + [FAR] * (store.T - n)
        for name in ("key", "value"):
            want = torch.stack([getattr(k, name) for k in row]) if row else torch.zeros(0, D)
            torch.testing.assert_close(planes[name][b, h, :n], want, rtol=1e-4, atol=1e-5, check_dtype=False)
            torch.testing.assert_close(zeroed[name][b, h, :n], want, rtol=1e-4, atol=1e-5, check_dtype=False)
            assert (zeroed[name][b, h, n:] == 0).all()
            assert planes[name].isfinite().all()
        for name, spec in PLANES.items():
            want = torch.stack([k.planes[name] for k in row]) if row else torch.zeros(0, *spec.width)
            torch.testing.assert_close(planes[name][b, h, :n].double(), want.double(), rtol=1e-4, atol=1e-5)
            assert (planes[name][b, h, n:] == spec.fill).all()
    covered = sorted(n for c in store.classes for n in c.numbers())
    assert covered == list(range(B * G))
    for c in store.classes:  # slots not in use, spare room included: fills, and finite keys
        for name in PLANES:
            assert (c.planes[name][:, c.bound :] == PLANES[name].fill).all()
        assert (c.planes["token"][:, c.bound :] == FAR).all()
        for name in ("key", "value"):
            assert (getattr(c.pool, name) if c.paged else c.planes[name]).isfinite().all()
        assert c.heads == {n % G for n in c.numbers()}
        assert c.capacity % 16 == 0


class Twins:
    """A store and its specification, taken through the same random moves."""

    def __init__(self, seed: int, layout: Layout = LENGTHS):
        # moves come from a plain generator: hypothesis prefers small choices, which would hardly ever disorder a row
        self.choose, self.noise = Random(seed), torch.Generator().manual_seed(seed)
        self.layout = layout
        self.store, self.naive, self.heads = LayerStore(PLANES, layout), Naive(), self.choose.randint(1, 3)
        self.append(1, 40, batch=self.choose.randint(1, 3))

    def run(self, moves: int) -> None:
        check(self.store, self.naive)
        for move in self.choose.choices(MOVES, k=moves):
            getattr(self, move)()
            check(self.store, self.naive)

    def maybe(self) -> bool:
        return self.choose.random() < 0.5

    def random(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.noise)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.naive.rows), self.heads

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor([[len(row) for row in heads] for heads in self.naive.rows])

    def append(self, least: int = 1, most: int = 1, batch: int | None = None) -> None:
        batch = batch or self.shape[0]
        length = self.choose.randint(least, most)
        key, value = self.random(batch, self.heads, length, D) - 0.5, self.random(batch, self.heads, length, D) - 0.5
        first = self.naive.counts or [0] * batch
        same = len(set(first)) == 1
        as_number = same and self.maybe()
        self.store.append(key, value, first[0] if as_number else torch.tensor(first))
        self.naive.append(key, value, first)

    def extend(self) -> None:
        self.append(2, 30)

    def mask(self, into: bool = False) -> None:
        B, G = self.shape
        share = 0.2 + self.random(B, G, 1)
        if self.maybe():  # some rows keep nothing, some everything
            share = share * 2 - 1
        mask = self.random(B, G, self.store.T) < share
        renumber = self.maybe()
        if into:
            target = self.slots()
            mask.scatter_(2, target[..., None], True)
            gone = {(b, h): [i for i in range(len(row)) if not mask[b, h, i]] for b, h, row in self.naive.each()}
            self.naive.fold(target, gone)
        self.naive.mask(mask, renumber)
        self.store.apply(Keep(mask=mask, into=target if into else None, renumber=renumber * self.store.T))

    def stay(self) -> None:
        """Every row keeps equally many keys, and most often they grow on together."""
        if self.lengths.min() == 0:
            return
        count = self.choose.randint(1, int(self.lengths.min()))
        some = [[sorted(self.choose.sample(range(len(row)), count)) for row in heads] for heads in self.naive.rows]
        slots = torch.tensor(some)
        mask = torch.zeros(*self.shape, self.store.T, dtype=torch.bool).scatter_(2, slots, True)
        self.naive.mask(mask, renumber=False)
        self.store.apply(Keep(slots=slots))
        assert self.store.all_hold(count) and not self.store.all_hold(count + 1)
        for _ in range(self.choose.randint(0, 2)):
            check(self.store, self.naive)
            self.extend()

    def merge_many(self) -> None:
        if self.lengths.min() > 0:
            self.mask(into=True)

    def slots(self) -> torch.Tensor:
        return (self.random(*self.shape) * self.lengths).long()

    def drop(self, into: bool = False, optional: bool = False, heads: list[int] | None = None) -> None:
        if self.lengths.min() < 1 + into:
            return
        slot = self.slots()
        target = (slot + 1) % self.lengths if into else None
        if optional:
            slot = slot.where(self.random(*self.shape) < 0.6, -1)
        inside, renumber = set(heads if heads is not None else range(self.heads)), self.maybe()
        if into:
            wanted = {(b, h): [int(slot[b, h])] for b, h, _ in self.naive.each() if h in inside and slot[b, h] >= 0}
            self.naive.fold(target, wanted)
        self.naive.drop(slot, inside, renumber)
        self.store.apply(
            Keep(
                drop=slot,
                into=target,
                optional=optional,
                heads=None if heads is None else tuple(heads),
                renumber=renumber * self.store.T,
            )
        )

    def drop_some(self) -> None:
        self.drop(optional=True)

    def drop_heads(self) -> None:
        heads = [h for h in range(self.heads) if self.maybe()]
        self.drop(heads=heads, optional=self.maybe(), into=self.maybe())

    def merge_one(self) -> None:
        self.drop(into=True, optional=self.maybe())

    def take(self) -> None:
        sequences = self.choose.choices(range(self.shape[0]), k=self.choose.randint(1, 3))
        before, kept = self.naive.take(list(range(self.shape[0]))), self.store
        self.store, self.naive = kept.take(sequences), self.naive.take(sequences)
        self.drop_some()  # must not reach the store it was taken from
        check(kept, before)

    def become(self) -> None:
        B = self.shape[0]
        order = self.choose.sample(range(B), B)
        parts = [self.store.take([s]) for s in order] + ([self.store.take(order[:1])] if B < 3 else [])
        for part in parts[:1]:  # sequences that join have lives of their own
            part.apply(Keep(mask=part.valid))
        self.store = LayerStore(PLANES, self.layout)
        self.store.become([LayerStore(PLANES, self.layout), *parts])
        self.naive = self.naive.take([*order, *(order[:1] if B < 3 else [])])

    def crop(self) -> None:
        back = self.choose.randint(0, 5)
        self.naive.counts = [max(0, n - back) for n in self.naive.counts]
        for b, _, row in self.naive.each():
            row[:] = [k for k in row if k.token < self.naive.counts[b]]
        self.store.forget_after(self.naive.counts)

    def write(self) -> None:
        B, G = self.shape
        for name in ("score", "wide"):
            for add in (True, False) if self.maybe() else (False, True):
                x = self.random(B, G, self.store.T, *PLANES[name].width)
                (self.store.add if add else self.store.set)(name, x)
                for b, h, row in self.naive.each():
                    for i, k in enumerate(row):
                        k.planes[name] = x[b, h, i].double() + (k.planes[name] if add else 0)

    def pool(self) -> None:
        size = self.choose.choice([1, 4, 16])
        for what in ("kmin", "kmax", "kmean", "vmean"):
            got = self.store.pooled(what, size)
            assert got.shape[2] == math.ceil(self.store.T / size)
            for b, h, row in self.naive.each():
                for p in range(got.shape[2]):
                    page = [k.key if what[0] == "k" else k.value for k in row[p * size : (p + 1) * size]]
                    want = _pooled(page, what[1:])
                    torch.testing.assert_close(got[b, h, p], want, rtol=1e-4, atol=1e-5, check_dtype=False)

    def look_up(self) -> None:
        ids = torch.randint(0, max(self.naive.counts) + 3, (self.shape[0], 1, 5), generator=self.noise)
        got = self.store.find(ids)
        for b, h, row in self.naive.each():
            tokens = [k.token for k in row]
            assert got[b, h].tolist() == [tokens.index(t) if t in tokens else -1 for t in ids[b, 0].tolist()]


def _pooled(page: list[torch.Tensor], kind: str) -> torch.Tensor:
    if not page:
        return torch.zeros(D)
    x = torch.stack(page)
    return x.mean(0) if kind == "mean" else getattr(x, "a" + kind)(0)


MOVES = [
    *("append", "extend", "mask", "stay", "merge_many", "drop", "drop_some", "drop_heads", "merge_one"),
    *("take", "become", "crop", "write", "pool", "look_up"),
]


@pytest.mark.parametrize("layout", [LENGTHS, PAGES])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(6, 14))
def test_any_sequence_of_moves_equals_lists(layout, seed, moves):
    Twins(seed, layout).run(moves)


@pytest.mark.parametrize("layout", [LENGTHS, PAGES])
@pytest.mark.parametrize("seed", range(4))
def test_a_long_decode_with_evictions_equals_lists(seed, layout):
    """Rows replace keys for longer than any spare room lasts."""
    twins = Twins(seed, layout)
    for i in range(60):
        twins.append()
        twins.drop(optional=i % 20 == 19)
        if i % 10 == 0:
            twins.pool()
    check(twins.store, twins.naive)


# ---------------------------------------------------------------------- single facts


def filled(batch=1, heads=2, length=8, planes=None, dtype=torch.float32, head_dim=D) -> LayerStore:
    torch.manual_seed(0)
    store = LayerStore(planes or {})
    key, value = torch.randn(2, batch, heads, length, head_dim, dtype=dtype)
    store.append(key, value, 0)
    return store


def test_uniform_rows_are_one_block_and_say_so():
    store = filled(batch=2, heads=3, length=10)
    assert store.single is not None and store.uniform == 10 and store.T == 10 and store.held([0, 2]) == 10
    store.apply(Keep(drop=torch.zeros(2, 3, dtype=torch.long)))
    assert store.single is not None and store.uniform == 9
    mask = torch.ones(2, 3, 9, dtype=torch.bool)
    mask[1, 1, 4:] = False
    store.apply(Keep(mask=mask))
    assert store.uniform is None and store.held([0]) == 9 and store.held([1]) is None and store.held([0, 2]) == 9


def test_heads_that_part_ways_are_split_and_stay_countable():
    """Limited to some heads, dropping frees memory and lengths stay known without asking the device."""
    store = filled(heads=4, length=64, head_dim=64)
    for token in range(64, 1064):
        store.append(torch.randn(1, 4, 1, 64), torch.randn(1, 4, 1, 64), token)
        store.apply(Keep(drop=torch.zeros(1, 4, dtype=torch.long), heads=(1, 3)))
    assert store.held([0, 2]) == 1064 and store.held([1, 3]) == 64 and store.held([0, 1]) is None
    dense = 4 * 1064 * 2 * 64 * 4
    assert store.nbytes < (0.5 + 0.5 * 64 / 1064 + 0.05) * dense


def test_mask_keeps_the_order_and_drop_moves_the_last_key():
    store = filled(heads=1, length=6)
    store.apply(Keep(drop=torch.tensor([[1]])))
    assert store.token.tolist() == [[[0, 5, 2, 3, 4]]]
    store.apply(Keep(mask=torch.tensor([[[True, True, False, True, True]]])))
    assert store.token.tolist() == [[[0, 5, 3, 4]]]


def test_rows_of_different_blocks_meet_in_one_and_keep_their_places():
    store = filled(heads=4, length=64)
    keep = torch.tensor([64, 8, 64, 8])
    store.apply(Keep(mask=(torch.arange(64) < keep[:, None])[None]))
    assert [c.numbers() for c in store.classes] == [[0, 2], [1, 3]]
    before = store.keys()
    store.apply(Keep(mask=(torch.arange(64) < 8).expand(1, 4, 64)))
    assert store.uniform == 8 and torch.equal(store.keys(), before[:, :, :8])


def test_renumbering_goes_by_age_not_by_slot():
    store = filled(heads=1, length=5, planes={"shift": Plane(0, torch.int32)})
    store.apply(Keep(drop=torch.tensor([[1]]), renumber=5))
    assert store.token.tolist() == [[[0, 4, 2, 3]]] and store.plane("shift").tolist() == [[[1, 0, 0, 0]]]
    store.apply(Keep(mask=store.token != 2, renumber=5))
    assert store.token.tolist() == [[[0, 4, 3]]] and store.plane("shift").tolist() == [[[2, 0, 0]]]
    assert store.shift_bound == 5


def test_rows_that_grow_together_take_each_page_once():
    noise = torch.Generator().manual_seed(0)
    pages, lengths, seen = LayerStore({}, PAGES), LayerStore({}, LENGTHS), 0
    for length in (40, 30, *[1] * 70, 45, *[1] * 40, 33):
        key, value = (torch.randn(2, 2, length, D, generator=noise) for _ in range(2))
        for store in (pages, lengths):
            store.append(key, value, seen)
            if seen == 0:
                store.apply(Keep(slots=torch.arange(0, 40, 4).expand(2, 2, -1)))
        seen += length
    assert pages.uniform == lengths.uniform == seen - 30
    assert torch.equal(pages.keys(), lengths.keys()) and torch.equal(pages.values(), lengths.values())
    assert torch.equal(pages.token, lengths.token)


def test_slots_that_stay_must_be_there():
    store = LayerStore({}, PAGES)
    store.append(torch.ones(1, 2, 5, D), torch.ones(1, 2, 5, D), 0)
    for slots in (torch.arange(6).expand(1, 2, -1), torch.arange(3).expand(1, 1, -1)):
        with pytest.raises(InputError, match="at most 5 slots that stay for 1 sequences x 2 KV heads"):
            store.apply(Keep(slots=slots))
    with pytest.raises(InputError, match="exactly one of them"):
        Keep(slots=slots, mask=torch.ones(1, 2, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="use `mask` with"):
        Keep(slots=slots, renumber=3)


def test_a_row_that_keeps_nothing_fills_again():
    store = filled(heads=2, length=40)
    store.apply(Keep(mask=torch.tensor([True, False])[None, :, None].expand(1, 2, 40)))
    assert store.len.tolist() == [[40, 0]]
    key = torch.randn(1, 2, 1, D)
    store.append(key, key, 40)
    assert store.len.tolist() == [[41, 1]] and torch.equal(store.keys()[0, 1, 0], key[0, 1, 0])
    assert (store.keys()[0, 1, 1:] == 0).all()
    store.apply(Keep(mask=torch.zeros(1, 2, 41, dtype=torch.bool)))
    assert store.T == 0 and store.find(torch.tensor([[[3]]])).tolist() == [[[-1], [-1]]]
    store.append(key, key, 41)
    assert store.token.tolist() == [[[41], [41]]] and store.uniform == 1


def test_dropping_from_rows_without_keys():
    store = filled(heads=1, length=1)
    store.apply(Keep(drop=torch.tensor([[0]])))
    store.apply(Keep(drop=torch.tensor([[-1]]), optional=True))
    assert store.len.tolist() == [[0]]
    with pytest.raises(InputError, match="no key"):
        store.apply(Keep(drop=torch.tensor([[0]])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_low_precision_keys_rounds_once(dtype):
    """A mean of 200 keys in bfloat16 is as good as the mean in float32, rounded; masses stay exact."""
    store = filled(length=200, planes={"mass": Plane(1.0)}, dtype=dtype)
    exact = store.keys().float().mean(2)
    mask = torch.zeros(1, 2, 200, dtype=torch.bool)
    mask[:, :, 7] = True
    store.apply(Keep(mask=mask, into=torch.full((1, 2), 7)))
    torch.testing.assert_close(store.keys()[:, :, 0], exact.to(dtype), rtol=2**-7, atol=1e-3)
    assert (store.keys()[:, :, 0].float() - exact).abs().max() <= exact.abs().max() * 2**-8 + 1e-4
    assert store.plane("mass").dtype == torch.float32 and (store.plane("mass") == 200).all()


def test_rows_that_lose_nothing_keep_their_bits_when_others_merge():
    store = filled(heads=2, length=5, planes={"mass": Plane(1.0)}, dtype=torch.bfloat16)
    before = store.keys().clone()
    store.apply(Keep(drop=torch.tensor([[2, -1]]), into=torch.tensor([[0, -1]]), optional=True))
    assert torch.equal(store.keys()[0, 1], before[0, 1])
    assert store.plane("mass").tolist() == [[[2, 1, 1, 1, 1], [1, 1, 1, 1, 1]]]


def test_keys_with_mass_zero_merge_without_nan():
    store = filled(heads=1, length=4, planes={"mass": Plane(0.0)})
    store.apply(Keep(drop=torch.tensor([[2]]), into=torch.tensor([[0]])))
    assert store.keys().isfinite().all() and (store.plane("mass") == 0).all()


def test_appending_to_ragged_rows_takes_a_number_and_ids():
    store = filled(batch=2, heads=1, length=4)
    store.apply(Keep(drop=torch.tensor([[0], [-1]]), optional=True))
    store.append(torch.ones(2, 1, 1, D), torch.ones(2, 1, 1, D), 4)
    assert store.token.tolist() == [[[3, 1, 2, 4, FAR]], [[0, 1, 2, 3, 4]]]
    store.append(torch.ones(2, 1, 2, D), torch.ones(2, 1, 2, D), torch.tensor([9, 20]))
    assert store.token.tolist() == [[[3, 1, 2, 4, 9, 10, FAR]], [[0, 1, 2, 3, 4, 20, 21]]]


def test_pages_follow_growth_and_eviction():
    """Full pages at the very end of a row, asked for twice, are not computed from nothing."""
    store = filled(length=16)
    for token in range(16, 150):
        first, again = store.pooled("kmax", 16).clone(), store.pooled("kmax", 16)
        torch.testing.assert_close(first, again)
        torch.testing.assert_close(again[:, :, -1], store.keys()[:, :, (token - 1) // 16 * 16 :].amax(2))
        store.append(torch.randn(1, 2, 1, D), torch.randn(1, 2, 1, D), token)
    store.apply(Keep(drop=torch.full((1, 2), 3)))
    torch.testing.assert_close(store.pooled("kmax", 16)[:, :, 0], store.keys()[:, :, :16].amax(2))
    with pytest.raises(InputError, match="kmin"):
        store.pooled("kmedian", 16)


def test_a_sequence_that_leaves_takes_only_its_own_memory():
    long, short = filled(length=3000), filled(length=40)
    store = LayerStore()
    store.become([long, short])
    assert store.take([1]).nbytes < 1.3 * 2 * 48 * (2 * D + 1) * 4
    assert store.take([1]).uniform == 40


def grown(batch: int, length: int) -> LayerStore:
    """In pages, a few of them to spare: what comes one by one makes room for more."""
    store = LayerStore(layout=Layout(paged=True))
    store.append(torch.randn(batch, 2, length, D), torch.randn(batch, 2, length, D), 0)
    store.append(torch.randn(batch, 2, 1, D), torch.randn(batch, 2, 1, D), length)
    return store


def test_pages_laid_end_to_end_are_whose_they_were_and_the_spare_ones_are_used_once():
    parts, joined = [grown(1, 512), grown(1, 448), grown(2, 384)], LayerStore(layout=Layout(paged=True))
    keys = [p.keys()[b] for p in parts for b in range(p.batch)]
    spare = sum(p.single.spare_pages for p in parts)
    assert all(p.single.spare_pages > 0 for p in parts)
    joined.become(parts)
    assert joined.single.spare_pages == spare  # nothing was copied key by key
    for step in range(60):  # every row takes new pages, and none of them is another row's
        new = torch.randn(4, 2, 1, D)
        joined.append(new, new, torch.full((4,), 1000 + step))
        keys = [torch.cat([k, x], 1) for k, x in zip(keys, new, strict=True)]
    for b, k in enumerate(keys):
        assert torch.equal(joined.keys()[b, :, : k.shape[1]], k)


def test_pages_mostly_empty_are_packed_when_they_join():
    joined = LayerStore(layout=Layout(paged=True))
    joined.become([grown(1, 32), grown(1, 64)])
    assert joined.single.spare_pages == 0
    assert joined.len.tolist() == [[33, 33], [65, 65]]


@pytest.mark.parametrize("layout", [Layout(), Layout(paged=True)])
def test_sequences_lie_apart_until_somebody_looks(layout):
    def part(batch):
        store = LayerStore(layout=layout)
        store.append(torch.randn(batch, 2, 8, D), torch.randn(batch, 2, 8, D), 0)
        return store

    one, two, joined = part(1), part(1), LayerStore(layout=layout)
    joined.become([one, two])
    assert (joined.batch, joined.empty) == (2, False)
    first, second = joined.alone()
    assert first is one and second is two
    joined.settle()
    assert [torch.equal(mine.keys(), its.keys()) for mine, its in zip(joined.alone(), (one, two), strict=True)] == [
        True
    ] * 2
    assert joined.alone()[0] is not one  # they share a block now
    joined.become([one, part(2)])  # two of them are one store
    assert [s.batch for s in joined.alone()] == [1, 1, 1]


def test_reset_and_misuse():
    store = filled(planes={"mass": Plane(1.0)})
    with pytest.raises(InputError, match="sequences"):
        store.append(torch.zeros(2, 2, 1, D), torch.zeros(2, 2, 1, D), 8)
    with pytest.raises(InputError, match="no plane 'acc'"):
        store.plane("acc")
    with pytest.raises(InputError, match="no plane 'key'"):
        store.set("key", store.keys())
    with pytest.raises(InputError, match="mass"):
        filled().apply(Keep(drop=torch.zeros(1, 2, dtype=torch.long), into=torch.ones(1, 2, dtype=torch.long)))
    with pytest.raises(InputError, match="planes"):
        filled().become([filled(), store])
    store.reset()
    assert store.empty and store.nbytes == 0 and store.T == 0 and store.len.numel() == 0
    with pytest.raises(InputError, match="empty"):
        _ = store.token
    store.append(torch.zeros(3, 1, 2, D), torch.zeros(3, 1, 2, D), 0)
    assert store.len.tolist() == [[2], [2], [2]]


# ---------------------------------------------------------------------- bytes

TOKENS, HEADS, HEAD_DIM = 2048, 4, 64
DENSE = HEADS * TOKENS * 2 * HEAD_DIM * 4
BUDGETS = {
    "quarter": [512] * 4,
    "half": [1024] * 4,
    "eighth": [256] * 4,
    "skewed": [2048, 64, 300, 20],
    "ladder": [100, 200, 400, 800],
    "nothing": [0, 1, 0, 2],
}


def after_prefill(kept: list[int], planes: int) -> LayerStore:
    store = filled(1, HEADS, TOKENS, {f"p{i}": Plane() for i in range(planes)}, head_dim=HEAD_DIM)
    if min(kept) < TOKENS:
        recent = torch.arange(TOKENS) >= TOKENS - torch.tensor(kept)[:, None]
        store.apply(Keep(mask=recent[None]))
    return store


@pytest.mark.parametrize("planes", [0, 1, 2])
@pytest.mark.parametrize("kept", BUDGETS.values(), ids=BUDGETS)
def test_bytes_follow_what_is_kept(kept, planes):
    """Allocated bytes are the kept share of a dense cache plus at most 2 points, ids and planes included."""
    share = sum(kept) / (HEADS * TOKENS)
    store = after_prefill(kept, planes)
    assert share * DENSE <= store.nbytes <= (share + 0.02) * DENSE
    for token in range(TOKENS, TOKENS + 200):  # and so it stays while every new key replaces an old one
        store.append(torch.zeros(1, HEADS, 1, HEAD_DIM), torch.zeros(1, HEADS, 1, HEAD_DIM), token)
        store.apply(Keep(drop=torch.zeros(1, HEADS, dtype=torch.long)))
    assert store.nbytes <= (share + 0.02) * DENSE


def test_a_dense_row_costs_its_keys_and_token_ids():
    store = after_prefill([TOKENS] * HEADS, 0)
    assert store.nbytes <= 1.01 * DENSE
    for token in range(TOKENS, TOKENS + 1000):
        store.append(torch.zeros(1, HEADS, 1, HEAD_DIM), torch.zeros(1, HEADS, 1, HEAD_DIM), token)
        held = (token + 1) / TOKENS
        assert store.nbytes <= (held * 1.01 * 17 / 16 + 16 / TOKENS) * DENSE

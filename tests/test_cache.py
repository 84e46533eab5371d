"""The store as a transformers cache: sequences come, go, fork, join, roll back, and logits stay those of a solo run."""

from dataclasses import dataclass

import pytest
import torch
from models import VOCAB, WINDOW, tiny

import foveal
from foveal.cache import Store
from foveal.edits import Keep, Plane
from foveal.errors import FovealError, InputError, UnsupportedModel
from foveal.method import Method

TOLERANCE = {"rtol": 0, "atol": 2e-4}


@dataclass(frozen=True)
class Window(Method):
    """Keeps the `sink` oldest and the newest keys, `size` in all; even KV heads twice as many."""

    size: int = 12
    sink: int = 2
    name = "test-window"
    planes = {"age": Plane(0.0)}

    def keep(self, step):
        size = torch.tensor([self.size * (2 - h % 2) for h in range(step.G)])[:, None]
        step.store.add("age", torch.ones(step.q.shape[0], step.G, step.T))
        if step.decode:
            return step.evict_one(step.oldest(after=self.sink), size[:, 0])
        last = step.q_token[:, -1, None, None]
        return Keep(mask=(step.token < self.sink) | (last - step.token < size - self.sink))


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def read(model, ids, store=None, **kwargs):
    """Logits of the new tokens and the cache."""
    out = model(input_ids=ids, past_key_values=store, use_cache=True, **kwargs)
    return out.logits, out.past_key_values


def step(model, ids: list[int], store: Store) -> torch.Tensor:
    """One decode step of a batch in which every sequence is at its own position."""
    return read(model, torch.tensor(ids)[:, None], store, position_ids=store.seen[:, None])[0][:, -1]


@pytest.fixture(params=[None, Window()], ids=["plain", "evicting"])
def attached(request):
    model = tiny("llama")
    with foveal.attach(model, request.param) as session:
        yield session


# ---------------------------------------------------------------------- what a person asks


def test_a_plain_store_reports_what_it_holds():
    model, ids = tiny("llama"), text(2, 40)
    with foveal.attach(model) as session:
        _, store = read(model, ids)
        assert store is session.store and store.seen.tolist() == [40, 40] and store.get_seq_length() == 40
        assert store.lengths.shape == (3, 2, 2) and (store.lengths == 40).all()
        stock = 3 * 2 * 2 * 40 * 2 * 16 * 4  # layers, sequences, KV heads, tokens, key and value, head_dim, bytes
        assert store.dense_nbytes == stock
        ids_and_rows = 3 * 4 * (40 * 4 + 8)
        spare = 3 * 4 * 8 * (2 * 16 + 1) * 4  # capacities are multiples of 16
        assert store.nbytes == stock + ids_and_rows + spare


def test_an_evicting_store_reports_what_it_holds():
    model = tiny("llama")
    with foveal.attach(model, Window()) as session:
        for token in [text(1, 100), text(1, 1), text(1, 1)]:
            read(model, token, session.store)
        store = session.store
        assert store.seen.tolist() == [102] and store.get_seq_length() == 102
        assert store.lengths.tolist() == [[[24, 12]]] * 3
        assert store.dense_nbytes == 3 * 2 * 102 * 2 * 16 * 4
        assert 3 * 36 * (2 * 16 + 2) * 4 < store.nbytes < 0.35 * store.dense_nbytes
        age = store.rows[0].plane("age")[0, 1]
        assert sorted(age[:12].tolist()) == [1, 2, *[3] * 10]


def test_an_empty_store_answers():
    with foveal.attach(tiny("llama")) as session:
        store = session.new_store()
        assert (
            store.nbytes == store.dense_nbytes == 0 and store.seen.tolist() == [] and store.lengths.shape == (3, 0, 0)
        )
        assert store.get_seq_length() == 0 and len(store) == 3
        store.crop(-3)
        assert Store.join([store, session.new_store()]).counts == []


# ---------------------------------------------------------------------- sequences come and go


def test_a_fork_goes_its_own_way(attached):
    model, ids = attached.model, text(2, 30)
    _, store = read(model, ids)
    fork = store.fork()
    other = [step(model, [5, 6], fork) for _ in range(20)]
    mine = [step(model, [7, 8], store) for _ in range(20)]
    _, fresh = read(model, ids)
    for want in mine:
        torch.testing.assert_close(step(model, [7, 8], fresh), want, **TOLERANCE)
    assert (mine[-1] - other[-1]).abs().max() > 0.1
    assert store.counts == fork.counts == [50, 50]
    memory = [{c.planes["key"].data_ptr() for r in s.rows for c in r.classes} for s in (store, fork)]
    assert not memory[0] & memory[1]


def test_a_sequence_joins_a_running_batch_and_leaves(attached):
    """Prompts of 40, 25, 33 tokens; the third joins after four steps, the first leaves after eight: logits as alone."""
    model = attached.model
    prompts = [text(1, n, seed=n) for n in (40, 25, 33)]
    tokens = text(3, 16, seed=9).tolist()
    solo = []
    for prompt, mine in zip(prompts, tokens, strict=True):
        _, store = read(model, prompt)
        solo.append([step(model, [t], store)[0] for t in mine])

    stores = [read(model, p)[1] for p in prompts]
    running, done = Store.join(stores[:2]), {0: 0, 1: 0, 2: 0}
    members = [0, 1]
    for i in range(12):
        if i == 4:
            running, members = Store.join([running, stores[2]]), [0, 1, 2]
        if i == 8:
            running, members = running.take([2, 1]), [2, 1]
        logits = step(model, [tokens[m][done[m]] for m in members], running)
        for m, got in zip(members, logits, strict=True):
            torch.testing.assert_close(got, solo[m][done[m]], **TOLERANCE)
            done[m] += 1
    assert done == {0: 8, 1: 12, 2: 8} and running.seen.tolist() == [41, 37]


def test_the_members_of_a_batch_have_rows_of_their_own(attached):
    """Joining and leaving again gives back the very store that came."""
    stores = [read(attached.model, text(1, n))[1] for n in (50, 20)]
    before = [[r.keys().clone() for r in s.rows] for s in stores]
    lengths = [s.lengths for s in stores]
    joined = Store.join(stores)
    for i in (0, 1):
        alone = joined.take([i])
        assert torch.equal(alone.lengths, lengths[i])
        assert all(torch.equal(a.keys(), b) for a, b in zip(alone.rows, before[i], strict=True))


def test_sequences_can_be_repeated_selected_and_reordered(attached):
    model = attached.model
    _, store = read(model, text(3, 30))
    rows = store.rows[1].keys()
    for change, order in (
        (lambda s: s.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda s: s.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda s: s.batch_select_indices(torch.tensor([1])), [1]),
        (lambda s: s.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ):
        changed = store.fork()
        change(changed)
        assert torch.equal(changed.rows[1].keys(), rows[order]) and len(changed.counts) == len(order)
        assert changed.batch_size == len(order)
        step(model, [3] * len(order), changed)  # and it goes on
    with pytest.raises(InputError, match=r"0\.\.2"):
        store.take([3])


# ---------------------------------------------------------------------- generate


def test_beam_search_equals_stock():
    model, ids = tiny("llama"), text(2, 20)
    how = {"num_beams": 3, "max_new_tokens": 20, "do_sample": False, "num_return_sequences": 2}
    want = model.generate(ids, **how)
    with foveal.attach(model):
        assert torch.equal(model.generate(ids, **how), want)
    assert len({tuple(row[20:].tolist()) for row in want}) > 1


def test_beam_search_with_left_padding_equals_stock():
    model, ids = tiny("llama"), text(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    how = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    want = model.generate(ids, **how)
    with foveal.attach(model) as session:
        assert torch.equal(model.generate(ids, **how), want)
        assert session.store.seen.tolist() == [13 + 11] * 3 + [20 + 11] * 3


def test_several_turns_with_one_cache_equal_stock():
    model = tiny("llama")

    def talk(**kwargs) -> torch.Tensor:
        cache, whole = kwargs.pop("cache", None), text(1, 12)
        for turn in range(3):
            out = model.generate(
                whole, past_key_values=cache, max_new_tokens=8, return_dict_in_generate=True, do_sample=False
            )
            cache, whole = out.past_key_values, torch.cat([out.sequences, text(1, 5, seed=turn)], 1)
        return whole

    want = talk()
    with foveal.attach(model) as session:
        assert torch.equal(talk(), want)
        assert isinstance(session.store, Store) and session.store.seen.tolist() == [12 + 3 * 8 + 2 * 5 - 1]


# ---------------------------------------------------------------------- going back


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_cropped_store_never_saw_those_tokens(family):
    model, ids = tiny(family), text(2, 40)
    with foveal.attach(model):
        _, store = read(model, ids)
        store.crop(-13)
        assert store.seen.tolist() == [27, 27] and store.get_seq_length() == 27 and (store.lengths == 27).all()
        again = text(2, 6, seed=4)
        got = [
            read(model, again[:, :4], store)[0],
            read(model, again[:, 4:5], store)[0],
            read(model, again[:, 5:], store)[0],
        ]
        want, _ = read(model, torch.cat([ids[:, :27], again], 1))
        torch.testing.assert_close(torch.cat(got, 1), want[:, 27:], **TOLERANCE)
        with pytest.raises(InputError, match="seen only 33"):
            store.crop(-34)
        with pytest.raises(InputError, match="negative"):
            store.crop(3)
        store.crop(0)
        assert store.counts == [33, 33]


def test_crop_after_eviction_brings_nothing_back():
    model = tiny("llama")
    with foveal.attach(model, Window()):
        _, store = read(model, text(1, 60))
        assert not store.layers[0].is_croppable
        store.crop(-4)
        assert store.lengths.tolist() == [[[20, 8]]] * 3
        assert store.rows[0].token[0, 1, :8].tolist() == [0, 1, *range(50, 56)]


def test_a_reset_store_starts_anew(attached):
    model, ids = attached.model, text(2, 30)
    _, store = read(model, text(3, 20, seed=3))
    store.reset()
    assert store.get_seq_length() == 0 and store.nbytes == 0
    got, same = read(model, ids, store)
    assert same is store and store.seen.tolist() == [30, 30]
    torch.testing.assert_close(got, read(model, ids)[0], **TOLERANCE)
    torch.testing.assert_close(step(model, [3, 4], store), step(model, [3, 4], read(model, ids)[1]), **TOLERANCE)


# ---------------------------------------------------------------------- hybrid models


@pytest.mark.parametrize("method", [None, Window()], ids=["plain", "evicting"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("length", [WINDOW // 2, 3 * WINDOW])
def test_sequences_of_a_hybrid_model_come_and_go(family, length, method):
    model, ids = tiny(family), text(3, length)
    with foveal.attach(model, method):
        _, store = read(model, ids)
        fork, two = store.fork(), store.take([2, 0])
        a, b = store.take([0]), store.take([1])
        for i in range(WINDOW + 3):
            whole = step(model, [5 + i, 6 + i, 7 + i], store)
            torch.testing.assert_close(step(model, [7 + i, 5 + i], two), whole[[2, 0]], **TOLERANCE)
            if i == 4:
                joined = Store.join([b, a])
            if i < 4:
                step(model, [5 + i], a), step(model, [6 + i], b)
            else:
                torch.testing.assert_close(step(model, [6 + i, 5 + i], joined), whole[[1, 0]], **TOLERANCE)
        assert fork.seen.tolist() == [length] * 3
        again = step(model, [5, 6, 7], fork)
        fresh = read(model, ids)[1]
        torch.testing.assert_close(step(model, [5, 6, 7], fresh), again, **TOLERANCE)


def test_hybrid_sequences_of_unequal_windows_are_refused_and_unharmed():
    model = tiny("gemma2")
    with foveal.attach(model):
        short, long = read(model, text(1, 5))[1], read(model, text(1, 40))[1]
        with pytest.raises(UnsupportedModel, match="equally many keys"):
            Store.join([short, long])
        longer = read(model, text(1, 60))[1]
        solo = [step(model, [3], s.fork())[0] for s in (long, longer)]
        got = step(
            model, [3, 3], Store.join([long, longer])
        )  # full windows may join, whatever their sequences' lengths
        torch.testing.assert_close(got, torch.stack(solo), **TOLERANCE)
        assert torch.equal(step(model, [3], short), step(model, [3], read(model, text(1, 5))[1]))


def test_a_hybrid_store_goes_back_only_where_it_can():
    model, ids = tiny("gemma2"), text(1, 40)
    with foveal.attach(model) as session:
        _, store = read(model, ids[:, : WINDOW - 4])
        store.crop(-5)
        got = read(model, ids[:, WINDOW - 9 : WINDOW], store)[0]
        torch.testing.assert_close(got, read(model, ids[:, :WINDOW])[0][:, WINDOW - 9 :], **TOLERANCE)

        _, store = read(model, ids)
        with pytest.raises(UnsupportedModel, match="cannot go back"):
            store.crop(-5)
        assert store.counts == [40] and (store.lengths == 40).all()  # nothing has changed

        store = session.new_store()
        store.activate_past_recording()
        read(model, ids, store)
        store.crop(-5)
        got = read(model, ids[:, 35:], store)[0]
        torch.testing.assert_close(got, read(model, ids)[0][:, 35:], **TOLERANCE)


def test_bytes_of_a_hybrid_store_count_the_memory_behind_a_window():
    model = tiny("gemma2")
    with foveal.attach(model):
        _, store = read(model, text(1, 200))
        window = store.layers[0].keys
        assert window.shape[2] == WINDOW - 1
        assert store.nbytes > 2 * 2 * window.untyped_storage().nbytes()
        read(model, text(1, 1), store)
        full = 2 * 2 * 201 * 2 * 16 * 4
        assert full < store.dense_nbytes < full + 2 * 2 * 2 * 17 * 16 * 4 + 100
        assert store.take([0]).dense_nbytes == store.dense_nbytes - 2 * 2 * 2 * 16 * 4  # copies hold just the window


# ---------------------------------------------------------------------- misuse


def test_a_store_outlives_its_session_only_as_data():
    model = tiny("llama", fresh=True)
    with foveal.attach(model):
        _, store = read(model, text(1, 10))
    with pytest.raises(FovealError, match="no longer attached"):
        read(model, text(1, 1), store)
    with foveal.attach(model):
        assert read(model, text(1, 1), store)[1] is store and store.counts == [11]


def test_a_store_of_another_method_is_refused():
    model = tiny("llama")
    with foveal.attach(model, Window()) as session:
        _, other = read(model, text(1, 10))
        with pytest.raises(InputError, match="holds 1 sequences but the input has 2"):
            read(model, text(2, 1), session.store)
    with foveal.attach(model):
        with pytest.raises(InputError, match="another method"):
            read(model, text(1, 1), other)
        _, mine = read(model, text(1, 10))
        with pytest.raises(InputError, match="different methods"):
            Store.join([mine, other])
        with pytest.raises(InputError, match="at least one"):
            Store.join([])

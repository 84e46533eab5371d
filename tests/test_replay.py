"""A replayed reading is the method's own reading: same keys kept, same planes, same next tokens."""

from dataclasses import dataclass

import pytest
import torch
from models import tiny

import foveal
from foveal.edits import Keep
from foveal.heads import HeadRoles
from foveal.hub import model_identity
from foveal.method import Method
from foveal.replay import can_replay, record

PROMPT, STEPS = 60, 4
NAMES = [name for name, cls in foveal.methods().items() if cls.dense_prefill]
OTHERS = [name for name, cls in foveal.methods().items() if not cls.dense_prefill]
COMPOSITIONS = ["quest(budget=16,page=4,skip=0)|h2o(budget=0.5)", "top-k(budget=0.5)|scissorhands(budget=0.5)"]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def build(model, tmp_path_factory):
    """A method in the form its `example` describes, with head roles made up for this model where it asks for them."""
    shape = (3, model.config.num_hidden_layers, model.config.num_attention_heads)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("roles") / "roles.json"
    names = ("retrieval", "induction", "echo")
    HeadRoles(model_identity(model), dict(zip(names, scores, strict=True)), {"made": "for tests"}).save(path)

    def make(name):
        if "|" in name:
            return foveal.get_method(name)
        cls = foveal.methods()[name]
        here = {"roles": str(path)} if "roles" in cls.__dataclass_fields__ else {}
        if "heads" in cls.example:
            here["heads"] = ((1, 0),)  # layer 1 has full attention in both models
        return foveal.get_method(name, **dict(cls.example) | here)

    return make


@torch.no_grad()
def steps(model, store, ids):
    """Logits of teacher-forced decode steps, [STEPS, vocab]."""
    out = [model(ids[:, PROMPT + t : PROMPT + t + 1], past_key_values=store).logits[0, -1] for t in range(STEPS)]
    return torch.stack(out)


@torch.no_grad()
def read(model, ids):
    return model(ids[:, :PROMPT]).past_key_values


def check_equal(got, expected):
    """Two stores hold the same tokens, keys, values and planes for every row of every layer."""
    assert got.counts == expected.counts == [PROMPT]
    assert torch.equal(got.lengths, expected.lengths)
    for a, b in zip(got.rows, expected.rows, strict=True):
        assert torch.equal(a.token, b.token)
        torch.testing.assert_close(a.keys(), b.keys(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values(), b.values(), atol=1e-5, rtol=1e-5)
        assert a.specs.keys() == b.specs.keys()
        for name in a.specs:
            torch.testing.assert_close(a.plane(name), b.plane(name), atol=1e-5, rtol=1e-5)
    for a, b in zip(got.layers, expected.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length()
        if not hasattr(a, "rows"):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)


def test_there_is_something_to_replay():
    assert {"h2o", "quest", "razor", "scissorhands"} <= set(NAMES)
    assert OTHERS


@pytest.mark.parametrize("name", NAMES + COMPOSITIONS)
def test_a_replay_is_the_methods_own_reading(name, model, ids, build):
    method = build(name)
    recording = record(model, ids[:, :PROMPT], [method])
    with foveal.attach(model, method) as session:
        store, seconds = recording.replay(session)
        own = read(model, ids)
        check_equal(store, own)
        torch.testing.assert_close(steps(model, store, ids), steps(model, own, ids), atol=1e-4, rtol=1e-4)
        assert torch.equal(store.lengths, own.lengths)
    assert recording.seconds > 0
    assert seconds > recording.seconds


def test_no_method_replays_as_dense(model, ids):
    recording = record(model, ids[:, :PROMPT])
    with torch.no_grad():
        expected = model(ids).logits[0, PROMPT:]
    with foveal.attach(model) as session:
        store, _ = recording.replay(session)
        check_equal(store, read(model, ids))
        torch.testing.assert_close(steps(model, store, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_methods_that_read_differently_are_refused(name, model, ids, build):
    method = build(name)
    assert not can_replay(method)
    assert not can_replay(method | build("quest"))
    recording = record(model, ids[:, :PROMPT])
    with foveal.attach(model, method) as session, pytest.raises(foveal.InputError, match="reads differently"):
        recording.replay(session)


def test_one_reading_serves_many_and_replays_are_independent(model, ids, build):
    methods = [build("h2o"), build("scissorhands"), None, build("h2o")]
    recording = record(model, ids[:, :PROMPT], methods)
    found = []
    for method in methods:
        with foveal.attach(model, method) as session:
            store, _ = recording.replay(session)
            check_equal(store, read(model, ids))
            again, _ = recording.replay(session)
            first = steps(model, store, ids)
            for rows in store.rows:  # spoil what this replay holds: nobody else may see it
                for c in rows.classes:
                    c.planes["key"].zero_()
                    c.planes["value"].fill_(float("nan"))
            assert torch.equal(steps(model, again, ids), first)
            found.append(first)
    assert torch.equal(found[0], found[3])
    assert not torch.allclose(found[0], found[2], atol=1e-3)


@dataclass(frozen=True)
class Scheduled(Method):
    """Keeps what `begin` wrote down for this pass."""

    dense_prefill = True
    name = "scheduled"

    def begin(self, pass_):
        pass_.state["last"] = pass_.counts[0] + pass_.length - 1
        return "schedule"

    def keep(self, step):
        if step.decode:
            return None
        return Keep(mask=(step.token % 2 == 0) | (step.token == step.state["last"]))


def test_a_replay_begins_as_a_reading_does(model, ids):
    recording = record(model, ids[:, :PROMPT], [Scheduled()])
    with foveal.attach(model, Scheduled()) as session:
        store, _ = recording.replay(session)
        check_equal(store, read(model, ids))
    assert (store.lengths == PROMPT // 2 + 1).all()

"""Which decode steps are captured and what a replay gives, on a CPU: a stand-in for a CUDA graph notes every operation while a step is
recorded, undoes what it did, and does the same operations on the same tensors at each replay."""

import sys
import weakref
from contextlib import contextmanager

import pytest
import torch
from models import tiny
from reference import role_file
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import foveal
from foveal import graphs, ops, page_rows
from foveal.graphs import SETTLED
from foveal.method import Method
from foveal.ops import leave, paged_attention, pages, ragged, scores
from foveal.store import Layout

PAGES = Layout(paged=True)
ASKING = {"_local_scalar_dense", "nonzero", "lift_fresh", "masked_select"}  # a copy to the host or from it


def tensors(x) -> list[torch.Tensor]:
    """All tensors in arguments, those of Pages among them."""
    found = []
    for leaf in tree_leaves(x):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dataclass_fields__"):
            found += tensors(list(vars(leaf).values()))
    return found


KERNELS = [  # what is launched as a whole on a GPU, and whether it changes what it is given
    *((own, True) for own in (pages.append_page_keys, pages.drop_page_keys, scores.pool_newest, ops.drop_least, leave.add_by_token)),
    *((own, False) for own in (ops.attend_ragged, paged_attention.page_logits, ragged.logits, ops.vote_slots, ops.marked_slots)),
    *((own, False) for own in (ops.top_slots, ops.few_slots, ops.page_bound, ops.attend_renumbered)),
]  # fmt: skip


class FakeGraph(TorchDispatchMode):
    """Operations in order. `now`: the graph that is being recorded."""

    now: "FakeGraph | None" = None

    def __init__(self):
        super().__init__()
        self.work, self.own, self.replays, self.shares = [], set(), 0, None

    def pool(self):
        return self.shares or self

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name in ASKING:
            raise RuntimeError(f"{name} is not permitted while a step is recorded")
        return self.note(op, args, kwargs or {}, op._schema.is_mutable)

    def note(self, op, args, kwargs, mutates: bool):
        before = [(t, t.clone()) for t in tensors((args, kwargs)) if mutates and storage(t) not in self.own]
        out = op(*args, **kwargs)
        for t, was in before:
            t.copy_(was)
        given = {storage(t) for t in tensors((args, kwargs))}
        fresh = [t for t in tensors(out) if t.numel() and storage(t) not in given]
        self.own |= {storage(t) for t in fresh}
        self.work.append((op, args, kwargs, out))  # also views, so that no memory is used twice
        return out

    def replay(self) -> None:
        self.replays += 1
        for op, args, kwargs, out in self.work:
            given = {storage(t) for t in tensors((args, kwargs))}
            for new, old in zip(tensors(op(*args, **kwargs)), tensors(out), strict=True):
                if old.numel() and storage(old) not in given:
                    old.copy_(new)


def storage(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


@pytest.fixture
def recorded(monkeypatch) -> list[FakeGraph]:
    """What was captured, one graph after the other."""
    made = []

    def kernel(own, mutates):
        def stand_in(*args, **kwargs):
            graph, FakeGraph.now = FakeGraph.now, None
            if graph is None:
                return own(*args, **kwargs)
            try:
                with _disable_current_modes():
                    return graph.note(own, args, kwargs, mutates)
            finally:
                FakeGraph.now = graph

        return stand_in

    stand_ins = {own: kernel(own, mutates) for own, mutates in KERNELS}
    foveal.methods()  # so that all modules that name a kernel are there
    for module in [m for name, m in sys.modules.items() if name.startswith("foveal.")]:
        for name, x in list(vars(module).items()):
            if callable(x) and getattr(x, "__hash__", None) and x in stand_ins:
                monkeypatch.setattr(module, name, stand_ins[x])

    @contextmanager
    def recording(graph, pool=None):
        graph.shares, FakeGraph.now = pool, graph
        try:
            with graph:
                yield
        finally:
            FakeGraph.now = None
        made.append(graph)

    monkeypatch.setattr(graphs.Graphs, "possible", staticmethod(lambda: True))
    monkeypatch.setattr(graphs, "_fits", lambda pass_, kwargs: pass_.decode)
    monkeypatch.setattr(graphs, "_recover", lambda: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    for name, x in (("CUDAGraph", FakeGraph), ("graph", recording), ("current_stream", lambda: None),
                    ("set_stream", lambda x: None), ("synchronize", lambda: None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, x)
    return made


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, 120, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def decode(model, method, ids, prompt: int, mask=None, use=lambda session: None, **how):
    """Logits of each token after the prompt, [batch, steps, vocabulary]."""
    with foveal.attach(model, method, layout=PAGES, **how) as session:
        mask = torch.ones_like(ids) if mask is None else mask
        at = (mask.cumsum(1) - 1).clamp(min=0)
        cache = model(ids[:, :prompt], attention_mask=mask[:, :prompt], position_ids=at[:, :prompt]).past_key_values
        out = []
        for i in range(prompt, ids.shape[1]):
            given = {"attention_mask": mask[:, : i + 1], "position_ids": at[:, i : i + 1]}
            out.append(model(ids[:, i : i + 1], past_key_values=cache, **given).logits)
            use(session)
    return torch.cat(out, 1)


def close(a, b) -> bool:
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


RECYCLED = "recycled(budget=24, stride=6)"
HIP = "hip(budget=24, sink=2, recent=4, query_block=8, dense=0, refresh=6)"


@pytest.mark.parametrize("method", [RECYCLED, HIP])
def test_each_kind_of_step_has_one_graph_and_both_are_replayed(method, recorded):
    """Every sixth step reads all keys or searches: its graph comes after as many of its kind as any other, and neither throws the
    other away."""
    model, ids = tiny("llama", num_hidden_layers=2), text(1, 90 + 60)
    sizes = []
    got = decode(model, method, ids, 90, use=lambda s: sizes.append(len(s.graphs.captured or ())))
    assert close(got, decode(model, method, ids, 90, graphs=False))
    cheap, full = recorded
    assert sizes.index(1) == SETTLED and sizes.index(2) == 6 * (SETTLED + 1) - 1 and sizes[-1] == 2
    assert full.replays == 60 // 6 - SETTLED - 1
    assert cheap.replays == 60 - 60 // 6 - SETTLED - 1
    assert full.pool() is cheap


@pytest.mark.parametrize("method", [RECYCLED, HIP])
def test_what_a_replay_of_one_kind_leaves_the_other_reads(method, recorded):
    """The stand-in really replays: marks made in a graph decide what is read. With another text all of it differs."""
    model, ids = tiny("llama", num_hidden_layers=2), text(1, 150)
    marks = []
    look = lambda s: marks.append([r.plane(method.partition("(")[0]).nonzero().tolist() for r in s.store.rows])
    decode(model, method, ids, 90, use=look)
    with_graphs, marks[:] = list(marks), []
    decode(model, method, ids, 90, use=look, graphs=False)
    assert with_graphs == marks


@pytest.mark.parametrize(
    "method", [RECYCLED, "recycled(budget=24, stride=4, similar=0.95)", "recycled(budget=0.3, stride=6)"]
)
def test_sequences_due_at_different_steps_are_captured_too(method, recorded):
    """One sequence reads everything where the other does not: a kind of its own, and nothing asks the host."""
    model, ids = tiny("llama", num_hidden_layers=2), text(2, 90 + 50)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    got = decode(model, method, ids, 90, mask)
    assert close(got, decode(model, method, ids, 90, mask, graphs=False))
    assert len(recorded) == 3 and all(g.replays > 1 for g in recorded)


@pytest.mark.parametrize("method", [HIP, "hip(budget=0.3, sink=2, recent=4, dense=0, refresh=3)"])
def test_sequences_that_search_at_different_steps_share_two_graphs(method, recorded):
    """A step in which any of them searches, and a step in which none does."""
    model, ids = tiny("llama", num_hidden_layers=2), text(3, 90 + 50)
    mask = torch.ones_like(ids)
    mask[1, :1], mask[2, :7] = 0, 0
    got = decode(model, method, ids, 90, mask)
    assert close(got, decode(model, method, ids, 90, mask, graphs=False))
    assert len(recorded) == 2 and all(g.replays > 1 for g in recorded)


def test_what_paid_is_recorded_again_where_memory_moved(recorded, monkeypatch):
    """At once; what came no more than a few times is not recorded at all."""
    monkeypatch.setattr(page_rows, "ROOM", 32)
    monkeypatch.setattr(graphs, "AHEAD", 8)
    model, ids, steps = tiny("llama", num_hidden_layers=1), text(1, 90 + 50), []

    def look(session):
        steps.append((session.store.rows[0].classes[0].generation, len(session.graphs.captured or ())))

    often = "recycled(budget=24, stride=3)"
    got = decode(model, often, ids, 90, use=look)
    assert close(got, decode(model, often, ids, 90, graphs=False))
    moves = sorted({generation for generation, _ in steps})
    found = {move: [n for generation, n in steps if generation == move] for move in moves[1:]}
    first, second = found.values()
    assert first[-1] == 2 and second[:3] == [1, 2, 2] and len(recorded) == 4
    steps.clear()
    decode(model, "recycled(budget=24, stride=12)", ids, 90, use=look)
    assert {n for _, n in steps} == {0, 1}


class Kinds(Method):
    """Three kinds of steps, of which the last asks the host where `asks`."""

    def __init__(self, asks: bool):
        object.__setattr__(self, "asked", asks)

    def begin(self, pass_):
        return pass_.counts[0] % 3 if pass_.decode else None

    def after(self, step) -> None:
        if self.asked and step.decode and step.pass_.counts[0] % 3 == 2:
            step.token.sum().item()


def test_a_kind_that_asks_the_host_leaves_the_others_their_graphs(recorded):
    model, ids, seen = tiny("llama", num_hidden_layers=1), text(1, 90 + 30), []
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        got = decode(
            model, Kinds(True), ids, 90, use=lambda s: seen.append((len(s.graphs.captured or ()), s.graphs.why))
        )
    assert close(got, decode(model, None, ids, 90, graphs=False))
    assert [g.replays for g in recorded] == [5, 5]  # each kind comes ten times
    assert seen[-1][0] == 2 and "_local_scalar_dense" in seen[-1][1]


def test_there_are_only_so_many_graphs(recorded, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    model, ids = tiny("llama", num_hidden_layers=1), text(1, 90 + 30)
    got = decode(model, Kinds(False), ids, 90)
    assert close(got, decode(model, None, ids, 90, graphs=False))
    assert [g.replays for g in recorded] == [5, 5]


@torch.no_grad()
def test_a_cache_that_moves_every_step_is_never_captured_and_one_that_went_is_not_held(recorded):
    """Beams copy the cache at each step. Without graphs, nothing here holds on to a cache."""
    model, ids = tiny("llama", num_hidden_layers=1), text(1, 90 + 20)
    with foveal.attach(model, None, layout=PAGES) as session:
        cache = model(ids[:, :90]).past_key_values
        for i in range(90, 100):
            model(ids[:, i : i + 1], past_key_values=cache)
            cache.reorder_cache(torch.tensor([0]))
        assert not recorded
        for i in range(100, 110):
            model(ids[:, i : i + 1], past_key_values=cache)
        assert len(recorded) == 1 and recorded[0].replays == 10 - SETTLED - 1
        pool = weakref.ref(cache.rows[0].classes[0].pool.key)
        recorded.clear()
        session.graphs.captured = session.store = cache = None
        assert pool() is None


@torch.no_grad()
def test_a_kind_that_came_often_is_recorded_at_once_in_the_next_cache(recorded):
    model, ids, counts = tiny("llama", num_hidden_layers=1), text(1, 90 + 12), []
    with foveal.attach(model, "h2o(budget=24)", layout=PAGES):
        for _ in range(2):
            cache = model(ids[:, :90]).past_key_values
            for i in range(90, 102):
                model(ids[:, i : i + 1], past_key_values=cache)
                counts.append(len(recorded))
    assert counts == [0] * SETTLED + [1] * (12 - SETTLED) + [2] * 12


def test_layers_that_run_out_of_room_at_different_steps_do_not_put_off_the_graph(recorded):
    """Of a prompt each layer keeps another share, so for many steps some layer's memory moves; then all move at once."""
    model, ids, room = tiny("llama", num_hidden_layers=6), text(1, 200 + 40), []
    look = lambda s: room.append([c.capacity - c._bound for c in (r.classes[0] for r in s.store.rows)])
    got = decode(model, "spatten(budget=0.5)", ids, 200, use=look)
    assert close(got, decode(model, "spatten(budget=0.5)", ids, 200, graphs=False))
    assert len(set(room[0])) > 3
    assert len(recorded) == 1 and recorded[0].replays == 40 - SETTLED - 1


@torch.no_grad()
@pytest.mark.parametrize("method", ["hisa(budget=0.3, block=4, blocks=5)", "quest(budget=24, page=8, skip=0)"])
def test_a_second_turn_reads_the_pages_of_its_own_prompt(method, recorded):
    """Pooled pages are made anew after a text of several tokens: a graph from before it must not read the old ones."""
    model, ids = tiny("llama", num_hidden_layers=1), text(1, 160)

    def turns(**how):
        out = []
        with foveal.attach(model, method, layout=PAGES, **how):
            cache = None
            for start, stop in (
                (0, 90),
                *((i, i + 1) for i in range(90, 110)),
                (110, 140),
                *((i, i + 1) for i in range(140, 160)),
            ):
                out.append(model(ids[:, start:stop], past_key_values=cache))
                cache = out[-1].past_key_values
        return torch.cat([x.logits for x in out], 1)

    assert close(turns(), turns(graphs=False))
    assert len(recorded) == 2 and recorded[1].replays > SETTLED


def test_pooled_pages_that_a_graph_cannot_see_the_end_of(recorded):
    """HISA's own blocks: capacity ends inside a page, and the newest key moves on to the next."""
    model, ids = tiny("llama", num_hidden_layers=1, max_position_embeddings=1024), text(1, 620 + 40)
    got = decode(model, "hisa(budget=0.5)", ids, 620)
    assert close(got, decode(model, "hisa(budget=0.5)", ids, 620, graphs=False))
    assert len(recorded) == 1 and recorded[0].replays == 40 - SETTLED - 1


STEPS = 40
BUDGETED = {name: cls for name, cls in foveal.methods().items() if "budget" in cls.__dataclass_fields__}


@pytest.mark.parametrize("name", BUDGETED)
def test_every_method_with_a_budget_gives_what_it_gives_without_graphs(name, recorded, tmp_path):
    """And nearly all its steps are replayed: one may be like no other."""
    model, ids, cls = tiny("llama", num_hidden_layers=2), text(1, 90 + STEPS), BUDGETED[name]
    made = dict(cls.example)
    if "roles" in cls.__dataclass_fields__:
        g = torch.Generator().manual_seed(1)
        made["roles"] = role_file(
            model, tmp_path, **{x: torch.rand(2, 6, generator=g) for x in ("retrieval", "induction", "echo")}
        )
    got = decode(model, cls(**made), ids, 90)
    assert close(got, decode(model, cls(**made), ids, 90, graphs=False))
    assert STEPS - SETTLED - 2 <= sum(g.replays for g in recorded) <= STEPS - SETTLED - 1 and len(recorded) == 1

"""How many launches a decode step of a method adds on a GPU, counted on a CPU: each kernel of ours counts as its launches, each
operation of PyTorch that does more than look at memory in another way as one."""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from reference import role_file
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import foveal
from foveal import decode, graphs, leaving, page_rows, paged, step
from foveal.edits import Leave, Plane
from foveal.leaving import in_one_launch
from foveal.methods.select import fasa
from foveal.once import Once
from foveal.ops import few, leave, paged_attention, pages
from foveal.ops.route import Route
from foveal.store import LayerStore, Layout

PROMPT, LAYERS, HEADS = 90, 3, 6
VIEWS = {
    "view", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "as_strided", "_unsafe_view", "detach", "alias", "t",
    "permute", "split", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided", "unfold", "_to_copy_same", "unbind",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Operations that are asked for, those of `views` left out."""

    def __init__(self, views: set[str] = VIEWS):
        super().__init__()
        self.count, self.seen, self.views = 0, [], views

    def add(self, name: str, launches: int = 1) -> None:
        self.count += launches
        self.seen += [name] * launches

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name not in self.views:
            self.add(name)
        return op(*args, **(kwargs or {}))


@pytest.fixture
def counting(monkeypatch):
    """Stand-ins for the kernels, which count themselves, and a step as a captured graph sees it."""
    now: list[Launches] = []

    def kernel(module, name, own, launches=lambda *_, **__: 1):
        def stand_in(*args, **kwargs):
            if now:
                now[0].add(name, launches(*args, **kwargs))
            with _disable_current_modes():
                return own(*args, **kwargs)

        monkeypatch.setattr(module, name, stand_in)

    kernel(page_rows, "append_page_keys", pages.append_page_keys)
    kernel(paged, "drop_page_keys", pages.drop_page_keys)
    attend = lambda *_, want="", **__: 2 if want == "" else 3
    kernel(decode.ops, "attend_ragged", paged_attention.attend_ragged, attend)
    kernel(step.leave, "add_by_token", leave.add_by_token)
    kernel(
        fasa, "few_slots", few.few_slots, lambda *_, each, **__: 5 + (not each)
    )  # logits, votes, four digits and the list
    kernel(paged, "leave_page_keys", lambda x: None if x.by_token is None else torch.full((1,), -1, dtype=torch.int32))
    monkeypatch.setattr(leaving, "leave_route", lambda x: Route("triton", "counted"))

    @contextmanager
    def counted():
        with Launches() as launches:
            now.append(launches)
            try:
                yield launches
            finally:
                now.clear()

    def blind(self, **kwargs):
        pass_ = graphs.ACTIVE.get()
        if not pass_.decode:
            return self.plain(**kwargs)
        rows = [rows.classes[0] for rows in pass_.store.rows]
        for c in rows:
            c.reserve(40)
        counts = torch.tensor(pass_.counts, dtype=torch.int32)
        with graphs.hidden(pass_, rows, counts), counted() as launches:
            out = self.plain(**kwargs)
        self.launches = launches
        return out

    monkeypatch.setattr(graphs.Graphs, "possible", staticmethod(lambda: True))
    monkeypatch.setattr(graphs.Graphs, "forward", blind)


@torch.no_grad()
def launches(model, method, layout: Layout | None = None) -> Launches:
    """Of the third decode step after a prompt."""
    ids = torch.randint(2, 120, (1, PROMPT + 3), generator=torch.Generator().manual_seed(0))
    with foveal.attach(model, method, layout=layout or Layout(paged=True)) as session:
        cache = model(ids[:, :PROMPT]).past_key_values
        for i in range(PROMPT, PROMPT + 3):
            model(ids[:, i : i + 1], past_key_values=cache)
        return session.graphs.launches


@pytest.fixture
def roles(tmp_path):
    g = torch.Generator().manual_seed(0)
    model = tiny("llama", num_hidden_layers=LAYERS)
    scores = {name: torch.rand(LAYERS, HEADS, generator=g) for name in ("retrieval", "induction", "echo")}
    return role_file(model, tmp_path, **scores)


@pytest.mark.parametrize(
    ("method", "each", "once"),
    [
        ("snapkv(budget=40, window=8)", 0, 0),
        ("duo(sink=4, recent=16, roles='{roles}')", 1, 0),  # leave
        ("razor(echo=0.05, induction=0.05, least=12, compress=3.0, roles='{roles}')", 2, 9),  # log of the mass, leave
        ("h2o(budget=40)", 3, 0),  # weights, their sum, leave
        ("h2o(budget=0.5)", 3, 10),
        ("scissorhands(budget=60, recent=4)", 2, 0),  # weights, their sum
        ("scissorhands(budget=0.9, recent=4)", 2, 0),
        ("spatten(budget=0.5)", 3, 24),  # weights, their sum by token, leave
        ("fasa(budget=20, chunks='slowest', heads='kv')", 6, 0),  # the list, which attention reads as it reads a row
        ("fasa(budget=0.25, chunks='slowest', heads='kv')", 6, 12),
        ("fasa(budget=8, chunks='slowest')", 7, 0),  # page lists and lengths for each query head
    ],
)
def test_a_step_adds_few_launches(method, each, once, counting, roles):
    """`each` a layer, beside `once` a step: budgets that are shares of the text, and what is carried from step to step."""
    model = tiny("llama", num_hidden_layers=LAYERS)
    plain, ours = launches(model, None), launches(model, method.replace("{roles}", roles))
    assert plain.count > 20 * LAYERS
    added = ours.count - plain.count
    assert added <= each * LAYERS + once, Counter(ours.seen) - Counter(plain.seen)
    assert added >= each * LAYERS - 2  # counted at all


def test_the_host_knows_lengths_where_a_step_only_adds_keys(counting, roles):
    """So a method that fills up, like scissorhands, knows when without asking the device; where keys leave, nobody claims to know."""
    model = tiny("llama", num_hidden_layers=LAYERS)
    for method, known in (
        ("scissorhands(budget=100, recent=4)", True),
        ("snapkv(budget=40, window=8)", True),
        ("h2o(budget=40)", False),
    ):
        with torch.no_grad(), foveal.attach(model, method, layout=Layout(paged=True)):
            ids = torch.randint(2, 120, (1, PROMPT + 2), generator=torch.Generator().manual_seed(0))
            cache = model(ids[:, :PROMPT]).past_key_values
            before = [rows.classes[0].lengths()[0] for rows in cache.rows]
            for i in range(2):
                model(ids[:, PROMPT + i : PROMPT + i + 1], past_key_values=cache)
            for n, rows in zip(before, cache.rows, strict=True):
                c = rows.classes[0]
                assert c.host == ([n + 2] * 2 if known else None)
                assert not known or c.pool.length.tolist() == c.host


def test_a_step_leaves_nothing_to_the_next_recording():
    """What a pass computed once lies in the memory of that run: a graph must not read it."""
    before = Once()
    pass_ = SimpleNamespace(counts=[5], once=before, on_device=None, horizon=0)
    rows = LayerStore(None, Layout(paged=True))
    rows.append(*torch.randn(2, 1, 2, 40, 64), 0)
    with graphs.hidden(pass_, rows.classes, torch.tensor([5])):
        recorded = pass_.once
    assert len({id(before), id(recorded), id(pass_.once)}) == 3


def test_the_count_sees_what_is_launched(counting):
    """Statistics for each query head cost more than their sum."""

    class Heads(type(foveal.get_method("h2o"))):
        columns = False

    model = tiny("llama", num_hidden_layers=LAYERS)
    few, many = (launches(model, m) for m in (foveal.get_method("h2o", budget=40), Heads(budget=40)))
    assert many.count >= few.count + 4 * LAYERS


def test_where_the_kernel_cannot_it_is_not_asked():
    """Means are not taken of codes, planes are moved where they are one number a key, and no kernel runs on a CPU."""
    specs = {"mass": Plane(1.0), "wide": Plane(0.0, width=(4,))}
    for layout, names, why in (
        (Layout(format="int8"), ("mass",), "codes"),
        (Layout(paged=True), ("mass", "wide"), "float32"),
        (Layout(paged=True), ("mass",), "one launch"),
    ):
        rows = LayerStore({name: specs[name] for name in names}, layout)
        rows.append(*torch.randn(2, 1, 2, 40, 64), 0)
        what = rows.classes[0].leaving(Leave(10, fold=True), 2, None)
        assert leave.leave_route(what).why == "the tensors are on cpu" and in_one_launch(rows, Leave(10)) is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leave, "no_kernel", lambda x: None)
            route = leave.leave_route(what)
        assert why in route.why and (route.name == "triton") == (why == "one launch")

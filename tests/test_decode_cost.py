"""What a decode step may cost: few operations, no look at the device; and prefill never holds a heads x length x total matrix."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from models import VOCAB, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import foveal
from foveal import ops
from foveal.heads import HeadRoles
from foveal.hub import model_identity

NAMES = sorted(foveal.methods())
PROMPT, STEPS, LONG = 80, 20, 1024
SYNCS = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)

# Methods that drop many keys at once, every few steps, look at the device then, and in no other step.
# whether a token breaks the line is seen on the host, after the captured step; rows that lose keys at different times are
# measured before they grow (in a graph their capacity stands for their length)
LOOKS = {"bottlenecked", "spatten"}
BULK = {"scissorhands": {"budget": 24, "recent": 4, "drop": 0.5}}


class Watch(TorchDispatchMode):
    """Counts operations, those that wait for the device, and the bytes of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.ops, self.syncs, self.largest = Counter(), Counter(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        self.ops[name] += 1
        if name in SYNCS:
            self.syncs[name] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.syncs["boolean index"] += any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):  # the memory behind a view, not the size it shows
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        self.syncs += Counter()  # forget zeros
        return out


@contextmanager
def watching(monkeypatch):
    """A Watch that sees what leaves tensors without an operation, too: tolist, numpy, cpu."""
    watch = Watch()

    def counted(name, own):
        def leave(self, *args, **kwargs):
            watch.syncs[name] += 1
            return own(self, *args, **kwargs)

        return leave

    with monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        with watch:
            yield watch


def text(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def build(tmp_path):
    """Makes a method by name for a model, with random head roles where it wants some."""

    def make(name: str, model, **params):
        if "roles" in foveal.methods()[name].__dataclass_fields__:
            names = ("retrieval", "induction", "echo")
            scores = dict(zip(names, torch.rand(3, 3, 6, generator=torch.Generator().manual_seed(1)), strict=True))
            roles = HeadRoles(model_identity(model), scores, {"made": "for tests"})
            params["roles"] = str(roles.save(tmp_path / "roles.json"))
        return foveal.get_method(name, **params)

    return make


@torch.no_grad()
def decode_steps(model, monkeypatch, batch: int = 2, steps: int = STEPS) -> list[Watch]:
    ids = text(batch, PROMPT + steps)
    cache, watches = model(ids[:, :PROMPT]).past_key_values, []
    for i in range(PROMPT, PROMPT + steps):
        with watching(monkeypatch) as watch:
            model(ids[:, i : i + 1], past_key_values=cache)
        watches.append(watch)
    return watches


# ---------------------------------------------------------------------- decode


@pytest.mark.parametrize("batch", [1, 4])
def test_a_plain_decode_step_adds_few_operations(batch, monkeypatch):
    model = tiny("llama")
    stock = decode_steps(model, monkeypatch, batch)
    with foveal.attach(model):
        plain = decode_steps(model, monkeypatch, batch)
    layers = model.config.num_hidden_layers
    added = sorted(sum(p.ops.values()) - sum(s.ops.values()) for p, s in zip(plain, stock, strict=True))
    assert added[0] > 0  # both were counted
    assert added[STEPS // 2] < 20 * layers
    # now and then the store makes room: it allocates, copies and fills three planes
    assert sum(a >= 20 * layers for a in added) <= 2 and added[-1] < 50 * layers


def test_a_plain_decode_step_never_looks_at_the_device(monkeypatch):
    model = tiny("llama")
    with foveal.attach(model):
        assert [dict(w.syncs) for w in decode_steps(model, monkeypatch)] == [{}] * STEPS


@pytest.mark.parametrize("name", [n for n in NAMES if n not in LOOKS])
def test_a_decode_step_of_a_method_never_looks_at_the_device(name, build, monkeypatch):
    model = tiny("llama")
    with foveal.attach(model, build(name, model, **foveal.methods()[name].example)):
        watches = decode_steps(model, monkeypatch)
    assert [dict(w.syncs) for w in watches] == [{}] * len(watches)


@pytest.mark.parametrize("name", BULK)
def test_bulk_compaction_never_looks_at_the_device_where_rows_are_equally_long(name, build, monkeypatch):
    model = tiny("llama")
    with foveal.attach(model, build(name, model, **BULK[name])) as session:
        watches = decode_steps(model, monkeypatch, steps=40)
        assert session.store.lengths.max() <= 24
    # the 25th key lets 12 go, once every 12 steps
    assert [i for i, w in enumerate(watches) if w.ops["topk"]] == [0, 12, 24, 36]
    assert not any(w.syncs for w in watches)


def test_the_watch_sees_a_look_at_the_device(monkeypatch):
    x = torch.arange(6.0)
    for look, name in (
        (lambda: x.sum().item(), "_local_scalar_dense"),
        (lambda: bool(x.any()), "_local_scalar_dense"),
        (lambda: x.nonzero(), "nonzero"),
        (lambda: x[x > 2], "boolean index"),
        (lambda: x.tolist(), "tolist"),
        (lambda: x.numpy(), "numpy"),
    ):
        with watching(monkeypatch) as watch:
            look()
        assert watch.syncs[name] >= 1


# ---------------------------------------------------------------------- prefill


def heads_by_length_by_total() -> int:
    return 6 * LONG * LONG * 4


@torch.no_grad()
def largest_of_a_prefill(model, monkeypatch) -> int:
    with watching(monkeypatch) as watch:
        model(text(1, LONG))
    return watch.largest


@pytest.mark.parametrize("name", NAMES)
def test_prefill_never_holds_all_weights(name, build, monkeypatch):
    model = tiny("llama", max_position_embeddings=2 * LONG)
    with foveal.attach(model, build(name, model, **foveal.methods()[name].example)):
        assert largest_of_a_prefill(model, monkeypatch) < heads_by_length_by_total() / 4


def test_the_watch_sees_all_weights_where_they_are_held(monkeypatch):
    model = tiny("llama", fresh=True, max_position_embeddings=2 * LONG)
    model.set_attn_implementation("eager")
    assert largest_of_a_prefill(model, monkeypatch) >= heads_by_length_by_total()


@pytest.mark.parametrize("op", ["attend", "attend_band", "attend_blocks", "attention_stats"])
@torch.no_grad()
def test_operations_never_hold_all_weights(op, monkeypatch):
    q, k, v = (torch.randn(1, heads, LONG, 16) for heads in (6, 2, 2))
    lse = ops.attend(q, k, v, scale=0.25, need_lse=True)[1]
    sparse = torch.rand(1, 6, LONG // 64, LONG // 64) < 0.5
    sparse |= torch.eye(LONG // 64, dtype=torch.bool)
    sink, recent = (4, 0, 8, 4, 4, 4), (64, 100, 700, 64, LONG, 64)
    run = {
        "attend": lambda: ops.attend(q, k, v, scale=0.25, softcap=20.0, need_lse=True),
        "attend_band": lambda: ops.attend_band(q, k, v, sink=sink, recent=recent, scale=0.25, need_lse=True),
        "attend_blocks": lambda: ops.attend_blocks(q, k, v, sparse, 64, scale=0.25, need_lse=True),
        "attention_stats": lambda: ops.attention_stats(q, k, lse, want=ops.stats.NAMES, scale=0.25),
    }
    with watching(monkeypatch) as watch:
        run[op]()
    assert sum(watch.ops.values()) > 5
    assert watch.largest < heads_by_length_by_total() / 4

"""A long text goes through the model block by block where that is possible, with the same results and the keys of one layer at a time."""

import pytest
import torch
from lens_reference import close
from models import tiny

from foveal.lens import by_layer, look
from foveal.lens.lens import Lens, Probe
from foveal.lens.sinks import Sinks

IDS = torch.randint(5, 120, (90,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def recorded(monkeypatch):
    """What `record` returned, in order."""
    found, record = [], by_layer.record
    monkeypatch.setattr(by_layer, "record", lambda *args: found.append(record(*args)) or found[-1])
    return found


def same(a, b) -> None:
    assert [m.name for m in a] == [m.name for m in b]
    for x, y in zip(a, b, strict=True):
        close(x.value, y.value, 1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral", "olmo2"])
def test_the_order_of_reading_changes_nothing(family, recorded, monkeypatch):
    model = tiny(family)
    seen = look(model, None, IDS, chunk=17, picture=True)
    assert recorded[0] is not None
    monkeypatch.setattr(by_layer, "record", lambda *args: None)
    same(seen, look(model, None, IDS, chunk=17, picture=True))


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_models_whose_layers_keep_caches_of_their_own_are_read_piece_by_piece(family, recorded):
    model = tiny(family)
    seen = look(model, None, IDS, "sinks", chunk=17)
    assert recorded == [None]
    close(seen["sinks.first"], look(model, None, IDS, "sinks")["sinks.first"])


class _Held(Lens):
    """Notes the bytes of the whole cache whenever a layer is seen."""

    name = "held"

    def __init__(self, recorded, notes):
        object.__setattr__(self, "recorded", recorded)
        object.__setattr__(self, "notes", notes)

    def probe(self, reading):
        held = self

        class Note(Probe):
            def attention(self, piece):
                held.notes.append(held.recorded[0][0].nbytes)

            def results(self):
                return []

        return Note()


def test_keys_of_one_layer_are_held_at_a_time(recorded):
    notes = []
    look(tiny("llama"), None, IDS, [_Held(recorded, notes)], chunk=17)
    assert len(notes) == 3 * 6
    keys, token = 2 * 2 * 16 * 4, 2 * 4  # bytes of a position: keys and values of two KV heads, and its number
    assert max(notes) <= (len(IDS) + 16) * (keys + token) + 100
    assert recorded[0][0].nbytes == 0


def scaled(module, args, output):
    return output * 1.1


def written(module, args, kwargs):
    (args[0] if args else kwargs["hidden_states"]).mul_(1.1)


def told(module, args, kwargs):
    h = args[0] if args else kwargs["hidden_states"]
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (cos * h.mean().tanh(), sin)}


@pytest.mark.parametrize("hook", [scaled, written, told])
def test_what_happens_between_blocks_is_not_lost(hook, recorded):
    """A hook stands for a decoder that changes the residual stream between blocks, or lets a block know of it."""
    model = tiny("llama", fresh=True)
    block = model.model.layers[1]
    plain = look(model, None, IDS, "sinks", chunk=90)["sinks.first"]
    if hook is scaled:
        model.model.layers[0].register_forward_hook(hook)
    else:
        block.register_forward_pre_hook(hook, with_kwargs=True)
    seen = look(model, None, IDS[:20], "sinks", chunk=10)["sinks.first"]
    assert recorded == [None]
    if hook is not told:  # its mean is that of a piece
        close(seen, look(model, None, IDS[:20], "sinks")["sinks.first"])
        assert not torch.allclose(seen[1:], plain[1:])


def test_blocks_are_left_as_they_were(recorded):
    model = tiny("llama", fresh=True)
    blocks = model.model.layers
    own = blocks[1].forward
    blocks[1].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as libraries that move weights do
    mine = blocks[1].forward

    def stop(line, share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(model, None, IDS, "sinks", chunk=17, progress=stop)
    look(model, None, IDS, "sinks", chunk=17)
    assert recorded[0] is not None
    assert blocks[1].forward is mine
    assert "forward" not in vars(blocks[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_in_inference_mode():
    model = tiny("llama")
    with torch.inference_mode():
        seen = look(model, None, IDS, [Sinks()], chunk=17)
    close(seen["sinks.first"], look(model, None, IDS, [Sinks()])["sinks.first"])

"""Moving cached keys: against each family's own rotary code, its own cache, and keys placed from scratch."""

import inspect
import sys

import pytest
import torch
from models import FAMILIES, MLA, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from foveal.errors import InputError, UnsupportedModel
from foveal.rope import Rope

TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


# Phi-3's configuration admits no type but "default" and "longrope".
COMBINATIONS = [(f, t) for f in FAMILIES for t in TYPES if f != "phi3" or t == "default"]


def with_type(family: str, rope_type: str, **more) -> PreTrainedModel:
    """`family` with all its layers on one rope type; per layer type where the family keeps several."""
    parameters = {"rope_type": rope_type, "rope_theta": 1e4} | TYPES.get(rope_type, {}) | more
    if family == "gemma3":
        local = {"rope_type": "default", "rope_theta": 100.0}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    return tiny(family, rope_parameters=parameters)


def attention_of(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    return next(
        m for m in model.modules() if getattr(m, "layer_idx", None) == layer and "Attention" in type(m).__name__
    )


def model_applies(model: PreTrainedModel, x: torch.Tensor, positions: torch.Tensor, layer: int) -> torch.Tensor:
    """x `[1, heads, L, D]` rotated to `positions [L]` by the family's rotary module and `apply_rotary_pos_emb`."""
    decoder = model.get_decoder()
    by_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    kind = (decoder.config.layer_types[layer],) if by_type else ()
    tables = decoder.rotary_emb(x, positions[None], *kind)
    function = sys.modules[type(attention_of(model, layer)).__module__].apply_rotary_pos_emb
    return function(x, x, *tables)[1]


def cached_keys(model: PreTrainedModel, first: int) -> list[torch.Tensor]:
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, position_ids=torch.arange(first, first + 12)[None].expand(2, -1))
    return [layer.keys for layer in cache.layers]


def assert_moves_like_the_model(model: PreTrainedModel) -> None:
    rope = Rope.of(model)
    torch.manual_seed(5)
    positions, delta = torch.arange(40), torch.tensor([-1, 3, 100, 450]).repeat(10)
    delta[1::4] = -positions[1::4]  # back to the start
    for layer in range(model.config.num_hidden_layers):
        raw = torch.randn(1, 2, 40, 16)
        written = model_applies(model, raw, positions, layer)
        moved = rope.rotate(written, delta, layer)
        torch.testing.assert_close(moved, model_applies(model, raw, positions + delta, layer), atol=1e-4, rtol=0)
        torch.testing.assert_close(rope.apply(raw, positions, layer), written, atol=1e-5, rtol=0)
        torch.testing.assert_close(rope.unrotate(written, positions, layer), raw, atol=1e-5, rtol=0)
        assert (moved - written).abs().max() > 0.5


@pytest.mark.parametrize("family, rope_type", COMBINATIONS)
def test_agrees_with_the_familys_own_function(family, rope_type):
    assert_moves_like_the_model(with_type(family, rope_type))


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "smollm3"])
def test_cache_of_a_shifted_run(family):
    """A model attends by distance: the whole run at positions + delta leaves the same keys, turned by delta."""
    model = tiny(family)
    rope = Rope.of(model)
    for layer, (early, late) in enumerate(zip(cached_keys(model, 5), cached_keys(model, 205), strict=True)):
        torch.testing.assert_close(rope.rotate(early, 200, layer), late, atol=2e-4, rtol=0)
        torch.testing.assert_close(rope.rotate(late, torch.tensor(-200), layer), early, atol=2e-4, rtol=0)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_partial_rotary_leaves_the_rest(family, share):
    model = with_type(family, "default" if family == "phi3" else "yarn", partial_rotary_factor=share)
    assert_moves_like_the_model(model)
    key = torch.randn(2, 2, 5, 16)
    moved, rotary_dim = Rope.of(model).rotate(key, 9, 0), int(16 * share)
    assert torch.equal(moved[..., rotary_dim:], key[..., rotary_dim:])
    assert ((moved - key)[..., :rotary_dim].abs().amax((0, 1, 2)) > 1e-3).all()


def test_layers_follow_their_own_type():
    model = tiny("gemma3")
    rope, key = Rope.of(model), torch.randn(1, 2, 5, 16)
    sliding, full, again, _ = (rope.rotate(key, 11, layer) for layer in range(4))
    assert torch.equal(sliding, again)
    assert (sliding - full).abs().max() > 0.1


def test_layers_without_rotary_stay():
    rope, key = Rope.of(tiny("smollm3")), torch.randn(1, 2, 5, 16)
    assert torch.equal(rope.rotate(key, 11, 2), key)
    assert torch.equal(rope.apply(key, 11, 2), key) and torch.equal(rope.unrotate(key, 11, 2), key)
    assert (rope.rotate(key, 11, 3) - key).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere", "gpt_oss"])
def test_rotations_form_a_group(family):
    rope, torch_rng = Rope.of(tiny(family)), torch.Generator().manual_seed(1)
    key = torch.randn(3, 2, 7, 16, generator=torch_rng)
    a, b = (torch.randint(-200, 200, (3, 2, 7), generator=torch_rng) for _ in range(2))
    assert torch.equal(rope.rotate(key, torch.zeros_like(a), 0), key)
    twice = rope.rotate(rope.rotate(key, a, 0), b, 0)
    torch.testing.assert_close(twice, rope.rotate(key, a + b, 0), atol=1e-4, rtol=0)
    torch.testing.assert_close(rope.rotate(key, a, 0).norm(dim=-1), key.norm(dim=-1), atol=1e-5, rtol=1e-5)
    one_by_one = torch.stack([rope.rotate(row, shift, 0) for row, shift in zip(key, a, strict=True)])
    torch.testing.assert_close(rope.rotate(key, a, 0), one_by_one)
    torch.testing.assert_close(rope.rotate(key, a[:, :1, :1], 0)[2, 1, 6], rope.rotate(key[2, 1, 6], a[2, 0, 0], 0))


@pytest.mark.parametrize("dtype, ulp", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_precision_rounds_once(dtype, ulp):
    """The result is the float32 rotation of the stored key, rounded once; the model may be in that dtype too."""
    model = tiny("llama", fresh=True).to(dtype)
    model.model.rotary_emb.inv_freq = tiny("llama").model.rotary_emb.inv_freq.clone()
    rope, key = Rope.of(model), torch.randn(2, 2, 9, 16).to(dtype)
    delta = torch.randint(-300, 300, (2, 2, 9))
    exact = Rope.of(tiny("llama")).rotate(key.float(), delta, 1)
    moved = rope.rotate(key, delta, 1)
    assert moved.dtype == dtype
    assert ((moved.float() - exact).abs() <= ulp * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("rope_type", TYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "gpt_oss"])
def test_slot_positions(family, rope_type):
    """Sinks and recent keys of a long sequence: shifting the sinks, the query at its true position, equals
    rotating the kept raw keys to their slots and the query to the slot after them."""
    model = with_type(family, rope_type)
    rope, length, kept = Rope.of(model), 400, [0, 1, 2, 3, *range(390, 400)]
    torch.manual_seed(2)
    query, key, value = torch.randn(1, 2, 1, 16), torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)
    kept = torch.tensor(kept)
    slots = torch.arange(len(kept))
    dropped_after = (length - kept) - (len(kept) - slots)
    for layer in range(2):
        cached = model_applies(model, key, torch.arange(length), layer)[:, :, kept]
        shifted = rope.rotate(cached, dropped_after, layer)
        at_slots = model_applies(model, key[:, :, kept], slots, layer)

        def attend(position, keys, layer=layer):
            q = model_applies(model, query, torch.tensor([position]), layer)
            return torch.nn.functional.scaled_dot_product_attention(q, keys, value[:, :, kept])

        got, want = attend(length, shifted), attend(len(kept), at_slots)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        assert (attend(length, cached) - want).abs().max() > 1e-2


def test_dynamic_uses_the_frequencies_of_the_moment():
    """Beyond the trained length, turning all cached keys by delta is asking from a query delta earlier."""
    model = with_type("llama", "dynamic")
    rope = Rope.of(model)
    torch.manual_seed(4)
    raw, query = torch.randn(1, 2, 30, 16), torch.randn(1, 2, 1, 16)
    cached = model_applies(model, raw, torch.arange(470, 500), 0)
    before = rope.rotate(cached, 60, 0)
    at_900 = model_applies(model, query, torch.tensor([900]), 0)
    assert (rope.rotate(cached, 60, 0) - before).abs().max() > 0.05, "frequencies should have changed by now"
    earlier = rope.apply(query, 840, 0)
    torch.testing.assert_close(
        at_900 @ rope.rotate(cached, 60, 0).mT, earlier @ cached.mT, atol=1e-3, rtol=0, msg="query and keys disagree"
    )
    model_applies(model, query, torch.tensor([10]), 0)  # a new, short sequence resets the frequencies
    assert torch.equal(rope.rotate(cached, 60, 0), before)


def test_gradient_is_the_rotation_back():
    model = tiny("qwen3", fresh=True)
    with torch.inference_mode():  # tables made while generating must serve training too
        rope = Rope.of(model)
        model.double().float()
        rope.rotate(torch.randn(1, 2, 3, 16), 5, 0)
    key, weight = torch.randn(1, 2, 3, 16, requires_grad=True), torch.randn(1, 2, 3, 16)
    (rope.rotate(key, 37, 0) * weight).sum().backward()
    torch.testing.assert_close(key.grad, rope.rotate(weight, -37, 0), atol=1e-5, rtol=0)


def test_decode_neither_waits_for_the_device_nor_breaks_the_graph():
    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    rope, key, delta = Rope.of(tiny("llama")), torch.randn(2, 2, 4, 16), torch.randint(0, 99, (2, 2, 4))
    with Calls() as calls:
        eager = rope.rotate(key, delta, 0)
    assert len(calls.names) <= 10
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"} & set(calls.names)
    compiled = torch.compile(lambda k, d: rope.rotate(k, d, 0), backend="eager", fullgraph=True)
    assert torch.equal(compiled(key, delta), eager)


def test_probe_leaves_the_model_as_it_was():
    model = with_type("llama", "dynamic")
    before = {name: tensor.clone() for name, tensor in [*model.named_buffers(), *model.named_parameters()]}
    logits = model(torch.arange(20)[None]).logits
    random_state = torch.get_rng_state()
    Rope.of(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[n], t) for n, t in [*model.named_buffers(), *model.named_parameters()])
    assert torch.equal(model(torch.arange(20)[None]).logits, logits)


@pytest.mark.parametrize(
    "family, reason",
    [
        ("gpt2", "no rotary module"),
        ("bloom", "no rotary module"),
        (MLA, "latent attention"),
        ("hunyuan", "no rotation of one another"),
    ],
)
def test_refuses_what_it_cannot_move(family, reason):
    with pytest.raises(UnsupportedModel, match=f"{reason}.*choose a method or setting that leaves positions"):
        Rope.of(tiny(family))


def test_refuses_other_rope_types_by_name():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 128}
    model = with_type("phi3", "longrope", factor=4.0, **factors)
    with pytest.raises(UnsupportedModel, match="'longrope': choose a method or setting that leaves positions"):
        Rope.of(model)


@pytest.mark.parametrize("wrong", ["backwards", "shuffled", "rescaled"])
def test_refuses_a_model_that_rotates_otherwise(wrong, monkeypatch):
    from transformers.models.llama import modeling_llama

    true = modeling_llama.apply_rotary_pos_emb

    def changed(q, k, cos, sin, unsqueeze_dim=1):
        if wrong == "backwards":
            return true(q, k, cos, -sin, unsqueeze_dim)
        if wrong == "shuffled":
            return tuple(x.flip(-1) for x in true(q, k, cos, sin, unsqueeze_dim))
        growth = torch.linspace(1.0, 1.1, cos.shape[-2])[None, :, None] * (1 + cos[..., -1:])
        return true(q, k, cos * growth, sin * growth, unsqueeze_dim)

    model = tiny("llama")
    Rope.of(model)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", changed)
    with pytest.raises(UnsupportedModel, match="no rotation of one another"):
        Rope.of(model)


def test_wrong_inputs_are_named():
    rope = Rope.of(tiny("llama"))
    with pytest.raises(InputError, match=r"layer with attention, one of \[0, 1, 2\], got 3"):
        rope.rotate(torch.randn(1, 2, 4, 16), 1, 3)
    with pytest.raises(InputError, match="head_dim 16"):
        rope.rotate(torch.randn(1, 2, 4, 8), 1, 0)
    with pytest.raises(InputError, match="broadcast over"):
        rope.rotate(torch.randn(1, 2, 4, 16), torch.ones(3, 2, 4, dtype=torch.long), 0)

"""Positions of cached keys: turn keys that already carry rotary position embedding to other positions."""

import inspect

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from foveal.errors import InputError, UnsupportedModel

SUPPORTED_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "proportional")
"""Rope types whose frequencies do not depend on the position ("dynamic": see `Rope`)."""

LEAVE = "choose a method or setting that leaves positions as they are."
_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
# Relative to the largest key entry. Rotary tables are probed in float32, so half precision only counts where a
# model casts the rotated key back; a wrong pairing or frequency misses by the size of the key itself.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Rope:
    """The rotary embedding of one model, acting on keys as they lie in its cache.

    Build it with `Rope.of(model)`, which checks every attention layer against the model's own code. Layers without
    rotary embedding in a model that has it elsewhere are left unchanged by all three operations.

    Frequencies are read from the model at each call, so moving or casting the model is followed. With rope type
    "dynamic" they change once the sequence outgrows the trained length, and transformers leaves older cached keys as
    they were written. `rotate` uses the current frequencies: turning all keys by `delta` then equals asking the same
    cache from a query `delta` positions earlier, and it equals a key written at the new position only while the
    frequencies have not changed since it was written.

    Angles are float32 as in transformers: a turn by 30,000 positions is exact to about 2e-3 rad in the fastest pair.
    Always turn the key as it was first written: repeated turns of a rounded bfloat16 key drift.
    """

    def __init__(self, plans: "dict[int, _Plan | None]"):
        self._plans = plans

    @classmethod
    @torch.inference_mode(False)  # tables made here may later be saved for a backward pass
    def of(cls, model: PreTrainedModel) -> "Rope":
        """Find the rotary module of `model`'s decoder and verify per layer that `rotate` moves its keys.

        Runs the query, key and value projections of each attention layer once on 12 random tokens, never attention
        itself. Raises UnsupportedModel where there is no rotary embedding, its type is none of `SUPPORTED_TYPES`, or
        a layer's stored keys are not rotations of one another.
        """
        decoder = model.get_decoder()
        rotary = _rotary_module(decoder)
        attentions = _attention_modules(decoder)
        plans: dict[int, _Plan | None] = {}
        shared: dict[tuple, _Plan] = {}
        for layer, attention in attentions.items():
            layer_type = decoder.config.layer_types[layer] if isinstance(rotary.rope_type, dict) else None
            written = _written_keys(decoder, rotary, attention, layer, layer_type)
            plans[layer] = _match(rotary, layer_type, layer, *written, shared)
        if not shared:
            raise UnsupportedModel(
                f"{type(decoder).__name__} has a rotary module, but no layer's keys change with the position: {LEAVE}"
            )
        return cls(plans)

    def rotate(self, key: Tensor, delta: Tensor | int, layer: int) -> Tensor:
        """Move keys stored at any position p to p + delta, for the layer with index `layer`.

        key `[..., head_dim]` as cached (rotated); delta integers, broadcast over `key.shape[:-1]`, negative allowed;
        returns the shape and dtype of key, computed in float32. A pure rotation: the attention scaling that YaRN
        folds into the tables is in the key already and stays as it is. No host synchronisation.
        """
        plan = self._plan(key, layer)
        return key if plan is None else plan.turn(key, delta).to(key.dtype)

    def apply(self, x: Tensor, position: Tensor | int, layer: int) -> Tensor:
        """Rotate raw queries or keys `[..., head_dim]` to `position`, with attention scaling, as the model does."""
        plan = self._plan(x, layer)
        return x if plan is None else (plan.turn(x, position) * plan.scale(x.device)).to(x.dtype)

    def unrotate(self, x: Tensor, position: Tensor | int, layer: int) -> Tensor:
        """Undo `apply`: the raw query or key `[..., head_dim]` of one that the model rotated to `position`."""
        plan = self._plan(x, layer)
        return x if plan is None else (plan.turn(x, -position) / plan.scale(x.device)).to(x.dtype)

    def frequencies(self, x: Tensor, layer: int) -> Tensor | None:
        """Radians a position, float32 `[head_dim / 2]` on x's device, of dimensions i and i + head_dim / 2 of a layer.

        None where the layer pairs them otherwise, or leaves some of them or all unchanged.
        """
        plan = self._plan(x, layer)
        return plan.by_halves(x.device) if plan is not None else None

    def _plan(self, x: Tensor, layer: int) -> "_Plan | None":
        if layer not in self._plans:
            raise InputError(f"Expected the index of a layer with attention, one of {[*self._plans]}, got {layer}.")
        plan = self._plans[layer]
        if plan is not None and x.shape[-1] != plan.head_dim:
            raise InputError(f"Expected head_dim {plan.head_dim} in layer {layer}, got a tensor of {tuple(x.shape)}.")
        return plan


class _Plan:
    """How layers of one kind pair and turn the dimensions of a head.

    Written as one formula for every pairing: x[i] cos a[i] + x[partner[i]] sin a[i], where the angle a is negative on
    the first dimension of a pair and zero on dimensions that do not rotate.
    """

    def __init__(self, rotary: nn.Module, layer_type: str | None, head_dim: int, interleaved: bool):
        prefix = "" if layer_type is None else f"{layer_type}_"
        self._rotary, self._frequencies, self._scaling = rotary, f"{prefix}inv_freq", f"{prefix}attention_scaling"
        self.head_dim, self._interleaved = head_dim, interleaved
        pair = torch.arange(getattr(rotary, self._frequencies).numel())
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pair.numel())
        self._partner = torch.arange(head_dim).index_copy(0, first, second).index_copy(0, second, first)
        self._pair = torch.zeros_like(self._partner).index_copy(0, first, pair).index_copy(0, second, pair)
        one = torch.ones(pair.numel())
        self._sign = torch.zeros(head_dim).index_copy(0, first, -one).index_copy(0, second, one)
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def turn(self, x: Tensor, position: Tensor | int) -> Tensor:
        """Rotate x `[..., head_dim]` by `position` steps, in float32."""
        frequency, partner = self._on(x.device)
        angle = frequency * (position[..., None] if isinstance(position, Tensor) else position)
        x32 = x.float()
        out = torch.addcmul(x32 * angle.cos(), x32.index_select(-1, partner), angle.sin())
        if out.shape != x.shape:
            raise InputError(
                f"Expected positions that broadcast over {tuple(x.shape[:-1])}, got {tuple(position.shape)}."
            )
        return out

    def by_halves(self, device: torch.device) -> Tensor | None:
        """Frequencies of the pairs where the first half of all dimensions pairs with the second."""
        halves = not self._interleaved and bool(2 * getattr(self._rotary, self._frequencies).numel() == self.head_dim)
        return self._on(device)[0][self.head_dim // 2 :] if halves else None

    def scale(self, device: torch.device) -> Tensor:
        """What the model's tables multiply into each dimension, `[head_dim]`: attention scaling where it rotates."""
        scaling = getattr(self._rotary, self._scaling, 1.0)
        return torch.where(self._sign.to(device) != 0, scaling, 1.0)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        source = getattr(self._rotary, self._frequencies)
        cached = self._tables.get(device)
        # "dynamic" and `model.to` put a new tensor in the buffer's place, so identity tells a stale table.
        if cached is None or cached[0] is not source:
            with torch.inference_mode(False):
                signed = source.to(device, torch.float32)[self._pair.to(device)] * self._sign.to(device)
                cached = self._tables[device] = (source, signed, self._partner.to(device))
        return cached[1], cached[2]


class _Written(Exception):
    """Carries what an attention layer was about to store out of it, before attention runs."""

    def __init__(self, key: Tensor, value: Tensor):
        self.key, self.value = key, value


class _Interceptor(DynamicCache):
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise _Written(key_states, value_states)


def _rotary_module(decoder: nn.Module) -> nn.Module:
    name = type(decoder).__name__
    found = [m for m in decoder.modules() if any(b.endswith("inv_freq") for b, _ in m.named_buffers(recurse=False))]
    if not found:
        raise UnsupportedModel(
            f"Turning keys to other positions needs rotary embedding, but {name} has no rotary module: {LEAVE}"
        )
    if len(found) > 1:
        raise UnsupportedModel(
            f"Expected one rotary module shared by all layers of {name}, found {len(found)}: {LEAVE}"
        )
    rope_type = getattr(found[0], "rope_type", None)
    for kind in rope_type.values() if isinstance(rope_type, dict) else [rope_type]:
        if kind not in SUPPORTED_TYPES:
            raise UnsupportedModel(
                f"Turning keys to other positions is known for rope types {', '.join(SUPPORTED_TYPES)}, but {name} uses {kind!r}: "
                f"{LEAVE}"
            )
    return found[0]


def _attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    """Attention modules by layer index: the innermost modules that take rotary tables and a cache."""

    def takes_both(module: nn.Module) -> bool:
        if not isinstance(getattr(module, "layer_idx", None), int):
            return False
        parameters = inspect.signature(module.forward).parameters
        return "position_embeddings" in parameters and any(name in parameters for name in _CACHE_ARGUMENTS)

    found = [module for module in decoder.modules() if takes_both(module)]
    outer = {id(m) for m in found for inner in m.modules() if inner is not m and any(inner is f for f in found)}
    attentions = {module.layer_idx: module for module in found if id(module) not in outer}
    if not attentions:
        raise UnsupportedModel(
            f"Expected attention layers that take `position_embeddings` and a cache, found none in "
            f"{type(decoder).__name__}: {LEAVE}"
        )
    return attentions


@torch.no_grad()
def _written_keys(
    decoder: nn.Module, rotary: nn.Module, attention: nn.Module, layer: int, layer_type: str | None
) -> tuple[Tensor, Tensor]:
    """What `attention` stores for the same four random tokens at three offsets: key `[3, G, 4, D]`, offsets `[3]`."""
    device = next(attention.parameters()).device
    # Inside the trained length, so that "dynamic" neither grows nor resets its frequencies here.
    limit = getattr(decoder.config, "max_position_embeddings", 512)
    offsets = torch.tensor([0, min(7, limit - 12), min(500, limit - 12)], device=device)
    positions = torch.tensor([0, 1, 5, 11], device=device) + offsets[:, None]
    noise = torch.randn(1, 4, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = noise.expand(3, -1, -1).to(device)
    kind = {} if layer_type is None else {"layer_type": layer_type}
    try:
        tables = rotary.forward(hidden, positions, **kind)
        written = _intercept(attention, hidden.to(decoder.dtype), position_embeddings=tables, position_ids=positions)
    except Exception as error:
        raise UnsupportedModel(
            f"Layer {layer} ({type(attention).__name__}) cannot be probed for its rotary embedding "
            f"({type(error).__name__}: {error}): {LEAVE}"
        ) from error
    if not _same(written.value[1:], written.value[:1]):
        raise UnsupportedModel(
            f"Expected values that do not depend on the position, but layer {layer} ({type(attention).__name__}) "
            f"stores something else (latent attention?): {LEAVE}"
        )
    return written.key, offsets


def _intercept(attention: nn.Module, hidden: Tensor, **known: object) -> _Written:
    """Run `attention` up to the point where it hands key and value to the cache."""
    parameters = inspect.signature(attention.forward).parameters
    known |= dict.fromkeys(_CACHE_ARGUMENTS, _Interceptor())
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {"position_ids": known["position_ids"]} if open_ended else {}
    for name, parameter in [*parameters.items()][1:]:  # the first is the hidden states, whatever their name
        if name in known:
            given[name] = known[name]
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            given[name] = None
    try:
        attention.forward(hidden, **given)  # not __call__: no hooks fire for a probe
    except _Written as written:
        return written
    raise RuntimeError("it stores no keys of its own")


def _same(x: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of expected's dtype (matrix products may round equal rows differently)."""
    error = (x.float() - expected.float()).abs().amax()
    return bool(error <= _TOLERANCE.get(expected.dtype, 1e-4) * expected.abs().amax().float())


def _match(
    rotary: nn.Module, layer_type: str | None, layer: int, key: Tensor, offsets: Tensor, shared: dict
) -> _Plan | None:
    """The plan under which all three copies of `key` are rotations of one another; None where they are equal."""
    if _same(key[1:], key[:1]):
        return None
    source, target = [0, 0, 2], [1, 2, 1]
    delta = (offsets[target] - offsets[source])[:, None, None]
    pairs = getattr(rotary, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq").numel()
    for interleaved in (False, True):
        if 2 * pairs > key.shape[-1]:
            break
        name = (layer_type, key.shape[-1], interleaved)
        plan = shared.get(name) or _Plan(rotary, layer_type, key.shape[-1], interleaved)
        if _same(plan.turn(key[source], delta), key[target]):
            return shared.setdefault(name, plan)
    raise UnsupportedModel(
        f"The keys of layer {layer} at two positions are no rotation of one another by the frequencies of "
        f"{type(rotary).__name__}, whether dimensions pair by halves or as neighbours: {LEAVE}"
    )

"""Put a method on a model, take it off again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.utils import ModelOutput

from .attention import foveal_attention
from .cache import ACTIVE, Store
from .edits import Plane
from .errors import FovealError, InputError, UnsupportedModel, suggest
from .graphs import Graphs
from .method import STATISTICS, Method, iterate
from .model_info import ModelInfo
from .ops.formats import check_format
from .ops.recent import check_window
from .parts import Part
from .prompt import PROMPT, real_columns, recount, shorten, whole
from .step import Pass
from .store import Layout

NAME = "foveal"
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def attach(
    model: PreTrainedModel, method: Method | str | None = None, *, layout: Layout | None = None, graphs: bool = True
) -> Session:
    """Put a method on a model; use as `with foveal.attach(model, method) as session:` or with `foveal.detach(model)`.

    method: a Method, a composition `a | b`, a name or specification like "h2o(budget=0.25)", or None for the plain path, whose
    logits are the model's own. layout: how keys and values lie in memory; None = pages on a GPU, length classes elsewhere. graphs: on a
    GPU, replay decode steps as CUDA graphs. On leaving, the model is as it was, also after an exception.
    Raises UnsupportedModel where the model cannot meet a need, InputError for bad values; nothing has changed then.
    """
    if isinstance(method, str):
        from .method import get_method

        method = get_method(method)
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"expected a transformers model, got {type(model).__name__}")
    if method is not None and not isinstance(method, Method):
        raise InputError(f"expected a foveal Method, a name or None, got {type(method).__name__}")
    if layout is not None:
        check_format(layout.format)
        check_window(layout.residual, layout.format)
        if layout.format is not None and layout.paged is False:
            raise InputError(
                f"format '{layout.format}' is stored in pages: leave `paged` out of the layout or set it to True"
            )
    decoder = model.get_decoder()
    if decoder in _ATTACHED:
        raise FovealError("this model is attached already: detach it first, or compose methods with `a | b`")
    return Session(model, decoder, method, layout, graphs)


def detach(model: PreTrainedModel) -> None:
    """Take the method off a model that was attached; no effect on a model that is not."""
    session = _ATTACHED.get(model.get_decoder())
    if session is not None:
        session.close()


class Session:
    """A model with a method on it. `store` is the cache of the latest forward pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: nn.Module,
        method: Method | None,
        layout: Layout | None = None,
        graphs: bool = True,
    ):
        self.model, self.decoder, self.method, self.layout = model, decoder, method, layout
        self.info = ModelInfo.of(model)
        self.config = decoder.config
        self.original = self.config._attn_implementation
        self.store: Store | None = None
        self.active = self._resolve(method)
        self.planes = _planes(method)
        self._used: dict[int, tuple] = {}  # what `use` set up, by the identity of the method
        self.read_share: float | None = None  # of the keys held, how many the latest decode step read
        self.clock: AbstractContextManager = nullcontext()  # entered around all that attention and the method do
        self._more = False
        self._tokens: list = []
        AttentionInterface.register(NAME, foveal_attention)
        AttentionMaskInterface.register(NAME, _mask)
        decoder.set_attn_implementation(NAME)
        if self.config._attn_implementation != NAME:
            raise UnsupportedModel(f"{type(model).__name__} does not let its attention implementation be set")
        self._hooks = [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(self._leave, always_call=True),
        ]
        self.graphs = Graphs(decoder.forward) if graphs and Graphs.possible() else None
        if self.graphs is not None:
            decoder.forward = self.graphs.forward
        _ATTACHED[decoder] = self

    def use(self, method: Method | None) -> None:
        """Run this method from the next forward pass on; caches of the others stay valid for when theirs is used again.

        Every method is set up once and has its own captured graph. Raises as `attach` does; the method in use then stays.
        """
        if method is self.method:
            return
        self._used[id(self.method)] = (self.method, self.active, self.planes, self.graphs)
        if id(method) not in self._used:
            graphs = None if self.graphs is None else Graphs(self.graphs.plain)
            self._used[id(method)] = (method, self._resolve(method), _planes(method), graphs)
        self.method, self.active, self.planes, self.graphs = self._used[id(method)]
        if self.graphs is not None:
            self.decoder.forward = self.graphs.forward

    def _resolve(self, method: Method | None) -> dict[int, tuple[Part, ...]]:
        """Which parts act on which layer, set up once; a layer nobody acts on costs nothing."""
        active: dict[int, list[Part]] = {i: [] for i in self.info.layers}
        for m in iterate(method):
            if not self.info.layers:
                raise UnsupportedModel(
                    f"{type(self.model).__name__} has no layer with full attention (sliding windows or linear layers only), so "
                    f"'{m.name}' has nothing to act on"
                )
            for need in m.needs:
                if need.partition(":")[0] not in (*STATISTICS, "whole_prompt"):
                    raise InputError(f"'{m.name}' needs '{need}': {suggest(need, (*STATISTICS, 'whole_prompt'))}")
            if m.format is not None and self.layout is not None and self.layout.paged is False:
                raise InputError(f"'{m.name}' stores keys as '{m.format}', in pages: leave `paged` out of the layout")
            part = Part(m, m.setup(self.info))
            if "read" in m.asks:
                active.setdefault(PROMPT, []).append(part)
            for i in m.where(self.info):
                if i in active:
                    active[i].append(part)
        return {i: tuple(parts) for i, parts in active.items()}

    # ------------------------------------------------------------------ around a forward pass

    def _enter(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._forget_interrupted()
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if decoder.training and any(getattr(m, "gradient_checkpointing", False) for m in decoder.modules()):
            raise InputError("gradient checkpointing runs attention twice and cannot be attached: switch it off first")
        given = kwargs.get("past_key_values")
        store = self._cache(given)
        kwargs["past_key_values"] = store
        x = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if x is None:
            raise InputError("the model was called without input_ids or inputs_embeds: give one of them")
        if x.shape[1] == 0 or x.shape[0] == 0:
            raise InputError("the prompt is empty: give at least one token")
        places, length = None, x.shape[1]
        if PROMPT in self.active and not any(store.counts):
            places = shorten(self, store, kwargs, real_columns(kwargs.get("attention_mask"), *x.shape[:2], False))
            x = kwargs["input_ids"]
        elif any(store.unread):
            recount(store, kwargs, x.device, length)
        pass_ = self._pass(store, kwargs, x.shape[0], x.shape[1])
        pass_.places, pass_.asked = places, length
        _place(store, pass_, kwargs, x.device)
        self.store = store
        pass_.returns_store = given is not None or _wants_cache(kwargs, self.config)
        self._tokens.append(ACTIVE.set(pass_))
        with self.clock:
            for sub in pass_.parts or [pass_]:
                for i, m in enumerate(iterate(self.method)):
                    sub.key[i] = m.begin(sub)
        return (), kwargs

    def _forget_interrupted(self) -> None:
        """Ctrl-C passes by the hook that ends a forward pass."""
        pass_ = ACTIVE.get()
        if pass_ is not None and pass_.session is self:
            pass_.store.owner = None
            ACTIVE.set(None)
            self._tokens.clear()

    def _leave(self, decoder: nn.Module, args: tuple, output: Any) -> Any:
        pass_ = ACTIVE.get()
        if pass_ is None or pass_.session is not self or not self._tokens:
            return None
        ACTIVE.reset(self._tokens.pop())
        if output is None:  # the forward pass raised: some layers hold its keys, others do not
            pass_.store.owner = None
            return None
        if pass_.held:
            self.read_share = pass_.read / pass_.held
        pass_.store.counts = [c + n for c, n in zip(pass_.counts, pass_.added, strict=True)]
        pass_.store.reading = self._more
        if pass_.places is not None:
            output = whole(pass_, output)
        if self.method is not None and "end" in self.method.asks:
            with self.clock:
                self._end(pass_)
        return output if pass_.returns_store else _without_store(output, pass_.store)

    def _end(self, pass_: Pass) -> None:
        """After the last layer; like every other hook of a prefill, once for each sequence with its own state."""
        store, parts = pass_.store, pass_.parts or [pass_]
        pieces = [store.take([b]) for b in range(len(parts))] if len(parts) > 1 else [store]
        for part, piece in zip(parts, pieces, strict=True):
            part.store = piece
            for m in iterate(self.method):
                m.end(part)
        if len(pieces) > 1:
            store.layers = Store.join(pieces).layers
            for rows in store.rows:
                rows.settle()

    def _cache(self, given: Cache | None) -> Store:
        if isinstance(given, Store):
            if given.owner is None:
                raise InputError("a forward pass failed half-way through this cache: start with an empty cache")
            if given.owner != self.signature:
                raise InputError(
                    "this cache was filled by another method or model: start with an empty cache after attaching"
                )
            return given
        if given is not None and given.get_seq_length() > 0:
            raise InputError("past_key_values holds tokens that this session did not read: start with an empty cache")
        return self.new_store()

    @property
    def signature(self) -> tuple:
        return (self.method, id(self.decoder))

    def new_store(self) -> Store:
        """An empty cache for this model and method."""
        evicts = self.method is not None and bool({"read", "keep", "end"} & set(self.method.asks))
        layout = self.layout or Layout()
        wanted = {m.format for m in iterate(self.method)} - {None}
        if layout.format is None and wanted:
            layout = layout._replace(format=wanted.pop())
        store = Store(self.config, self.info.layers, self.planes, evicts, layout)
        store.owner = self.signature
        return store

    def _pass(self, store: Store, kwargs: dict, batch: int, length: int) -> Pass:
        counts = store.counts or [0] * batch
        if len(counts) != batch:
            raise InputError(
                f"the cache holds {len(counts)} sequences but the input has {batch}: use one cache for each batch"
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise InputError(
                f"expected a 2-D attention mask [batch, columns], got {mask.ndim} dimensions: custom masks cannot be attached"
            )
        fresh = not any(counts)
        self._check_positions(kwargs.get("position_ids"), mask, length, fresh)
        decode = length == 1 and not fresh and not self._more and not store.reading
        ids = kwargs.get("input_ids")
        pass_ = Pass(self, store, counts, length, decode, not self._more, ids)
        columns = real_columns(mask, batch, length, decode)
        pass_.added = [length if c is None else c.stop - c.start if isinstance(c, slice) else len(c) for c in columns]
        self._check_length(counts, pass_.added)
        if not decode:
            pass_.columns = columns
            for b in range(batch):
                own = None if ids is None else (ids[b : b + 1] if columns[b] is None else ids[b : b + 1, columns[b]])
                sub = Pass(self, store, [counts[b]], pass_.added[b], False, not self._more, own)
                sub.columns = [None]
                pass_.parts.append(sub)
        return pass_

    def _check_length(self, counts: list[int], added: list[int]) -> None:
        limit = self.info.max_positions
        longest = max(c + n for c, n in zip(counts, added, strict=True))
        beyond = any(m.unbounded for m in iterate(self.method))
        if limit is not None and longest > limit and not beyond:
            raise InputError(f"the text is {longest} tokens long but the model has {limit} positions: shorten it")

    @staticmethod
    def _check_positions(position_ids: Tensor | None, mask: Tensor | None, length: int, fresh: bool) -> None:
        if position_ids is None or mask is not None or length == 1 or not fresh or position_ids.ndim != 2:
            return
        if bool((position_ids[:, 1:] != position_ids[:, :-1] + 1).any()):
            raise InputError(
                "position_ids restart inside a row: packed sequences cannot be attached, give them as a padded batch"
            )

    # ------------------------------------------------------------------ for callers

    @contextmanager
    def open_prompt(self) -> Iterator[None]:
        """Inside, forward passes are chunks of a prompt that goes on: methods that act at its end wait."""
        if any("whole_prompt" in m.needs for m in iterate(self.method)):
            raise InputError("a method of this session needs the whole prompt at once: do not read it in chunks")
        self._more = True
        try:
            yield
        finally:
            self._more = False

    @contextmanager
    def lent(self, method: Method | None) -> Iterator[None]:
        """Inside, another method is on the model, for texts of its own: what `read` runs."""
        mine, as_before = self.method, (self.store, self.read_share, self._more)
        self.use(method)
        self._more = False
        try:
            yield
        finally:
            self.use(mine)
            self._used.pop(id(method), None)
            self.store, self.read_share, self._more = as_before

    def close(self) -> None:
        """Leave the model as it was found."""
        if _ATTACHED.get(self.decoder) is not self:
            return
        self._forget_interrupted()
        for hook in self._hooks:
            hook.remove()
        if self.graphs is not None:
            del self.decoder.forward
        self.decoder.set_attn_implementation(self.original)
        del _ATTACHED[self.decoder]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _planes(method: Method | None) -> dict[str, Plane]:
    planes: dict[str, Plane] = {}
    for m in iterate(method):
        planes.update(m.planes)
    return planes


def _wants_cache(kwargs: dict, config: Any) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(getattr(config, "use_cache", True) if use_cache is None else use_cache)


def _without_store(output: Any, store: Store) -> Any:
    """What a caller who wants no cache gets: `generate` would read the whole text again on top of the one it got back."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: x for name, x in output.items() if x is not store})
    return tuple(x for x in output if x is not store) if isinstance(output, tuple) else output


def _place(store: Store, pass_: Pass, kwargs: dict, device: torch.device) -> None:
    """Sequences that joined or left a batch stand at their own positions, where the model would count columns of the batch."""
    if kwargs.get("position_ids") is not None:
        return
    if any(c is not None for c in pass_.columns):
        store.by_column = True  # this prompt's positions count its pads, so those of its next tokens must
    apart = set(store.counts) - {store.get_seq_length()}
    if apart and not store.by_column and kwargs.get("attention_mask") is None:
        first = torch.tensor(store.counts, device=device)
        kwargs["position_ids"] = first[:, None] + torch.arange(pass_.length, device=device)


def _mask(*, mask_function=causal_mask_function, config=None, local_size: int | None = None, **kwargs) -> Tensor | None:
    """Layers with a window keep the mask of the model's own implementation; the others need none."""
    pass_ = ACTIVE.get()
    if local_size is not None and pass_ is not None:
        own = ALL_MASK_ATTENTION_FUNCTIONS[pass_.session.original]
        return own(mask_function=mask_function, config=config, local_size=local_size, **kwargs)
    if mask_function is not causal_mask_function:
        raise UnsupportedModel(
            "the model asks for a mask that is not plain causal here: it cannot be attached for this input"
        )
    return None

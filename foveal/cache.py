"""The store as a transformers cache: `generate`, beams and plain forward calls use it like any other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .edits import Plane
from .errors import FovealError, InputError, UnsupportedModel
from .store import LayerStore, Layout

if TYPE_CHECKING:
    from .step import Pass

ACTIVE: ContextVar[Pass | None] = ContextVar("foveal_active_pass", default=None)


class StoreLayer(CacheLayerMixin):
    """One layer of a `Store`. `update` only announces the new keys; the attention call that follows appends them."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, index: int, planes: dict[str, Plane], is_croppable: bool = True, layout: Layout | None = None):
        super().__init__()
        self.is_croppable = is_croppable  # a rollback cannot bring back what a method evicted
        self.index, self.columns = index, 0
        self.rows = LayerStore(planes, layout)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        pass_ = ACTIVE.get()
        if pass_ is None:
            raise FovealError(
                "this cache was made by foveal.attach and the model is no longer attached: "
                "attach the same method again to go on"
            )
        pass_.pending = self
        self.is_initialized = True
        self.columns += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, padding included: what positions and 2-D masks count. Not the number of keys held."""
        return self.columns

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.rows.batch


class Store(Cache):
    """Keys and values of all layers, per sequence and per KV head; what `session.store` and `past_key_values` are.

    Layers that Foveal leaves alone (sliding windows, linear attention) keep the model's own cache layer.
    """

    def __init__(
        self,
        config,
        managed: Sequence[int],
        planes: dict[str, Plane],
        evicts: bool = False,
        layout: Layout | None = None,
    ):
        native = DynamicCache(config=config).layers
        layers = [
            StoreLayer(i, planes, not evicts, layout) if i in managed else layer for i, layer in enumerate(native)
        ]
        super().__init__(layers=layers)
        self.managed = tuple(managed)
        self.counts: list[int] = []  # real tokens seen by each sequence
        self.unread: list[int] = []  # tokens of its prompt that never entered the model; empty: none of any
        self.by_column = False  # positions count columns, pads too: a padded prompt came without position_ids
        self.reading = False  # what was read so far is the beginning of a prompt that goes on

    # ------------------------------------------------------------------ what a person asks

    @property
    def rows(self) -> list[LayerStore]:
        """The ragged layers, in order."""
        return [self.layers[i].rows for i in self.managed]

    @property
    def seen(self) -> Tensor:
        """Tokens each sequence has been through, kept or not, read or not: [batch]."""
        unread = self.unread or [0] * len(self.counts)
        return torch.tensor([c + n for c, n in zip(self.counts, unread, strict=True)], dtype=torch.long)

    @property
    def lengths(self) -> Tensor:
        """Keys held: [layers, batch, kv_heads], for the layers Foveal manages."""
        if not self.counts:
            return torch.zeros(len(self.managed), 0, 0, dtype=torch.long)
        return torch.stack([r.len.cpu() for r in self.rows])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the cache has allocated, planes included."""
        return sum(r.nbytes for r in self.rows) + self._native_bytes()

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the keys and values that a cache which keeps everything would need for the same tokens."""
        total = self._native_bytes()
        for r in self.rows:
            for c in r.classes[:1]:
                total += (sum(self.counts) + sum(self.unread)) * r.heads * sum(c.widths) * c.dtype.itemsize
        return total

    def _native_bytes(self) -> int:
        # a sliding window is a view: what counts is the memory behind it
        tensors = [t for i, layer in enumerate(self.layers) if i not in self.managed for t in _tensors(layer)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    # ------------------------------------------------------------------ sequences come and go

    def take(self, sequences: Sequence[int]) -> Store:
        """A new store with copies of these sequences; repeats are allowed."""
        bad = [s for s in sequences if not 0 <= s < len(self.counts)]
        if bad:
            raise InputError(f"the store holds sequences 0..{len(self.counts) - 1}, not {bad}")
        new = self._shell()
        new.counts = [self.counts[s] for s in sequences]
        new.unread = [self.unread[s] for s in sequences] if self.unread else []
        index = torch.tensor(list(sequences), dtype=torch.long)
        for old, layer in zip(self.layers, new.layers, strict=True):
            if isinstance(layer, StoreLayer):
                layer.rows = old.rows.take(sequences)
            else:
                layer.reorder_cache(index)  # any choice of sequences, not only permutations; on every kind of layer
        return new

    def fork(self) -> Store:
        """An independent copy of the whole store."""
        return self.take(range(len(self.counts)))

    @classmethod
    def join(cls, stores: Sequence[Store]) -> Store:
        """One batch out of the sequences of several stores of the same model and method; the stores are used up."""
        if not stores:
            raise InputError("join needs at least one store")
        if len({getattr(s, "owner", None) for s in stores}) > 1:
            raise InputError(
                "these caches were filled by different methods or models: join only those of one attached model"
            )
        stores = [s for s in stores if s.counts] or stores[:1]
        new = stores[0]._shell()
        new.counts = [n for s in stores for n in s.counts]
        if any(s.unread for s in stores):
            new.unread = [n for s in stores for n in s.unread or [0] * len(s.counts)]
        new.by_column = any(s.by_column for s in stores)
        new.reading = any(s.reading for s in stores)
        for i, layer in enumerate(new.layers):
            parts = [s.layers[i] for s in stores]
            if isinstance(layer, StoreLayer):
                layer.rows.become([p.rows for p in parts])
                layer.columns = max(p.columns for p in parts)
            elif len(stores) > 1:
                _join_native(layer, parts)
        return new

    @property
    def in_place(self) -> bool:
        """Whether sequences can come and go without the others being copied: all layers lie in pages."""
        return all(isinstance(layer, StoreLayer) and layer.rows.in_place for layer in self.layers)

    def leave(self, sequences: Sequence[int]) -> None:
        """Let these sequences go, but not all of them; the others are numbered anew."""
        stay = [s for s in range(len(self.counts)) if s not in set(sequences)]
        for layer in self.layers:
            if isinstance(layer, StoreLayer):
                layer.rows.leave(sequences)
            else:
                layer.reorder_cache(torch.tensor(stay))
        self.counts = [self.counts[s] for s in stay]
        self.unread = [self.unread[s] for s in stay] if self.unread else []

    def widen(self, sequences: int) -> None:
        """Places for `sequences` more sequences, without keys; where `in_place`."""
        for rows in self.rows:
            rows.widen(sequences)
        self.counts += [0] * sequences
        self.unread += [0] * sequences if self.unread else []

    def replace(self, sequence: int, other: Store | None) -> None:
        """Put the one sequence of `other` in the place of `sequence`; None: leave the place without keys. Where `in_place`.

        Raises InputError unless `other` holds one sequence of the same method and model.
        """
        if other is not None and (other.owner != self.owner or len(other.counts) != 1):
            raise InputError(
                "only one sequence, of the same method and model, can take a place: take it out of its batch first"
            )
        for i, layer in enumerate(self.layers):
            layer.rows.replace(sequence, None if other is None else other.layers[i].rows)
            if other is not None:
                layer.columns = max(layer.columns, other.layers[i].columns)
        self.counts[sequence] = 0 if other is None else other.counts[0]
        unread = sum(other.unread) if other is not None else 0
        if self.unread or unread:
            self.unread = self.unread or [0] * len(self.counts)
            self.unread[sequence] = unread

    def trim(self, most: float = 0.25) -> None:
        """Give pages back where more than the share `most` of a layer's is unused; where `in_place`."""
        for rows in self.rows:
            rows.trim(most)

    def _shell(self) -> Store:
        """The same layers without keys; native layers are copied whole."""
        new = object.__new__(Store)
        new.__dict__.update(self.__dict__)
        new.layers = []
        for layer in self.layers:
            if isinstance(layer, StoreLayer):
                fresh = StoreLayer(layer.index, layer.rows.specs, layer.is_croppable, layer.rows.layout)
                fresh.columns, fresh.is_initialized = layer.columns, layer.is_initialized
                new.layers.append(fresh)
            else:
                new.layers.append(deepcopy(layer))
        new.counts, new.unread = [], []
        return new

    def _replace(self, other: Store) -> None:
        self.layers, self.counts, self.unread = other.layers, other.counts, other.unread

    # ------------------------------------------------------------------ what transformers asks

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._replace(self.take(beam_idx.tolist()))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace(self.take(torch.arange(len(self.counts))[indices.cpu()].tolist()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(self.take([s for s in range(len(self.counts)) for _ in range(repeats)]))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest |tokens_to_remove| tokens of every sequence; keys evicted earlier do not come back."""
        if tokens_to_remove > 0:
            raise InputError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}")
        n = -int(tokens_to_remove)
        if n == 0 or not self.counts:
            return
        if n > min(self.counts):
            raise InputError(f"cannot remove {n} tokens: a sequence in the store has seen only {min(self.counts)}")
        native = [layer for layer in self.layers if not isinstance(layer, StoreLayer)]
        if not all(_can_crop(layer) for layer in native):
            raise UnsupportedModel(
                "this hybrid model cannot go back: sliding-window layers have let old keys go or linear layers have no "
                "past: call activate_past_recording() on the empty cache, or fork() before reading what may be undone"
            )
        self.counts = [c - n for c in self.counts]
        for layer in self.layers:
            if isinstance(layer, StoreLayer):
                layer.columns -= n
                layer.rows.forget_after(self.counts)
            else:
                layer.crop(-n)

    def reset(self) -> None:
        self.counts, self.unread, self.by_column, self.reading = [], [], False, False
        for layer in self.layers:
            if isinstance(layer, StoreLayer):
                layer.rows.reset()
                layer.columns, layer.is_initialized = 0, False
            else:
                layer.reset()


def _tensors(layer: object) -> list[Tensor]:
    """The tensors a native cache layer holds, also inside lists and dictionaries."""
    found: list[Tensor] = []
    stack: list = list(vars(layer).values())
    while stack:
        x = stack.pop()
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, dict):
            stack.extend(x.values())
        elif isinstance(x, Iterable) and not isinstance(x, (str, bytes)):
            stack.extend(x)
    return found


def _can_crop(layer: CacheLayerMixin) -> bool:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return layer.record_past or layer.get_seq_length() < layer.sliding_window
    return bool(layer.is_croppable)


def _join_native(layer: CacheLayerMixin, parts: Sequence[CacheLayerMixin]) -> None:
    if not isinstance(layer, DynamicLayer) or len({p.keys.shape[-2] for p in parts}) != 1:
        raise UnsupportedModel(
            "sequences of this hybrid model can join one batch only when its sliding-window layers hold equally many "
            "keys and it has no linear-attention layers: run these sequences one by one"
        )
    layer.keys = torch.cat([p.keys for p in parts])
    layer.values = torch.cat([p.values for p in parts])
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = max(p.cumulative_length for p in parts)

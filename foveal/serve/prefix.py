"""Prompts that begin alike are read once.

What is kept is the cache of a prompt at a chunk's end while more of the prompt is still to come. No method has acted on the end of
the prompt then, so whatever follows, reading on from there is what reading from the start would have come to. Entries belong to one
API key, method and budget: nobody can tell from the time an answer takes what others have asked.
"""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..cache import Store

Mark = tuple["Entry", int]


@dataclass(eq=False)
class Entry:
    """A cache after `length` tokens. `marks`: the digests under which it, or a shorter piece of it, can be found."""

    store: Store
    length: int
    nbytes: int
    marks: set[bytes]


class Prefixes:
    """Caches of prompt beginnings, the least recently used leave first. `most`: bytes they may hold together. `chunk`: their step.
    largest: of a number that differs between the processes that hold a model together, the one all go by."""

    def __init__(self, chunk: int, most: int, largest: Callable[[int], int] = int):
        self.chunk, self.most, self.largest = chunk, most, largest
        self.salt = os.urandom(16)
        self.entries: OrderedDict[int, Entry] = OrderedDict()
        self.index: dict[bytes, Mark] = {}
        self.hits = self.queries = 0

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries.values())

    def find(self, key: str, spec: str, prompt: Sequence[int], most: int) -> tuple[Store, int] | None:
        """A copy of the cache of the longest known beginning of a prompt, of up to `most` tokens, and its length."""
        self.queries += 1
        found = None
        for digest, n in self._digests(key, spec, prompt, most):
            found = (self.index[digest], n) if digest in self.index else found
        if found is None:
            return None
        self.hits += 1
        (entry, _), n = found
        self.entries.move_to_end(id(entry))
        copy = entry.store.fork()
        if n < entry.length:
            copy.crop(n - entry.length)
        return copy, n

    def put(self, key: str, spec: str, prompt: Sequence[int], store: Store, room: float = math.inf) -> None:
        """Keep a copy of a cache that holds a beginning of `prompt`, whole chunks of it, unless it is there or larger than `room` bytes."""
        length = store.counts[0]
        marks = list(self._digests(key, spec, prompt, length))
        if not marks or marks[-1][1] != length or marks[-1][0] in self.index:
            return
        size = self.largest(store.nbytes)
        if size > min(self.most, room):
            return
        while self.nbytes + size > self.most:
            self.drop_oldest()
        copy = store.fork()
        entry = Entry(copy, length, self.largest(copy.nbytes), set())
        self.entries[id(entry)] = entry
        cut = self.largest(not _whole(store))  # on any rank
        for digest, n in marks[-1:] if cut else marks:
            self._mark(digest, entry, n)

    def _mark(self, digest: bytes, entry: Entry, n: int) -> None:
        old = self.index.get(digest)
        if old is not None:
            old[0].marks.discard(digest)
            if not old[0].marks:
                self.entries.pop(id(old[0]), None)
        self.index[digest] = (entry, n)
        entry.marks.add(digest)

    def drop_oldest(self) -> bool:
        """Let go of the least recently used entry; False when there is none."""
        if not self.entries:
            return False
        _, entry = self.entries.popitem(last=False)
        for digest in entry.marks:
            self.index.pop(digest, None)
        return True

    def clear(self) -> None:
        self.entries.clear()
        self.index.clear()

    def _digests(self, key: str, spec: str, prompt: Sequence[int], most: int) -> Iterator[tuple[bytes, int]]:
        """A digest for each whole number of chunks up to `most` tokens; the server's salt keeps them from being guessed."""
        digest = hashlib.blake2b(repr((key, spec)).encode(), key=self.salt, digest_size=16)
        for n in range(self.chunk, most + 1, self.chunk):
            digest.update(array("q", prompt[n - self.chunk : n]).tobytes())
            yield digest.digest(), n


def _whole(store: Store) -> bool:
    """Nothing was let go and keys carry nothing else, so that a shorter piece of the cache is the cache of the shorter text."""
    if len(store.rows) < len(store.layers):
        return False
    return all(not r.specs and r.uniform == store.counts[0] for r in store.rows)

"""Core attention disaggregation (DistCA, 2025): the attention of packed documents cut into tasks of equal work for all ranks.

Attention without its projections has no weights, and only its cost is quadratic: a rank with one long document attends for longer
than one with many short ones. Here every document is a set of tasks, queries [start, stop) over keys [0, stop), that any rank can do.
A head slice and its mirrored tail slice of q queries each cost q (n + 1) together wherever they lie in a document of n tokens, so any
amount of work can be cut off. Queries and key prefixes travel to the rank of a task and results back; numbers are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from foveal.errors import InputError
from foveal.ops import attend


@dataclass(frozen=True)
class Document:
    """`length` tokens that lie on `rank` from its token `start` on."""

    rank: int
    start: int
    length: int


@dataclass(frozen=True)
class Task:
    """Queries [start, stop) of a document, by its number, over its keys [0, stop), causally."""

    document: int
    start: int
    stop: int

    @property
    def work(self) -> int:
        """Pairs of a query and a key."""
        return (self.stop * (self.stop + 1) - self.start * (self.start + 1)) // 2


@dataclass(frozen=True)
class Balance:
    """Pairs that each rank attends, and bytes that travel between ranks in the forward pass of one layer."""

    work: tuple[int, ...]
    bytes: int

    @property
    def unevenness(self) -> float:
        """Work of the busiest rank over the mean: 1 is even."""
        return max(self.work) * len(self.work) / max(1, sum(self.work))


@dataclass(frozen=True)
class Shape:
    """What a token weighs on the wire; the defaults are Llama 3 8B's in half precision."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2

    @property
    def query(self) -> int:
        """Bytes of a query and of its result."""
        return 2 * self.heads * self.head_dim * self.itemsize

    @property
    def key(self) -> int:
        """Bytes of a key and its value."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize


@dataclass(frozen=True)
class Plan:
    """`tasks[rank]`: what each rank attends, together every query of `documents` once. `before`: each rank its own documents."""

    documents: tuple[Document, ...]
    tasks: tuple[tuple[Task, ...], ...]
    shape: Shape

    @property
    def ranks(self) -> int:
        """How many ranks it is for."""
        return len(self.tasks)

    @cached_property
    def before(self) -> Balance:
        """Every rank attends its own documents."""
        work = [0] * self.ranks
        for document in self.documents:
            work[document.rank] += Task(0, 0, document.length).work
        return Balance(tuple(work), 0)

    @cached_property
    def after(self) -> Balance:
        """Every rank does its tasks."""
        moved = 0
        for server in range(self.ranks):
            for owner in range(self.ranks):
                if owner != server:
                    tasks, prefixes = self.message(owner, server)
                    moved += (
                        sum(t.stop - t.start for t in tasks) * self.shape.query
                        + sum(prefixes.values()) * self.shape.key
                    )
        return Balance(tuple(sum(task.work for task in tasks) for tasks in self.tasks), moved)

    def message(self, owner: int, server: int) -> tuple[list[Task], dict[int, int]]:
        """(tasks that `server` does on documents of `owner`, keys that it needs of each of these documents)."""
        tasks = [task for task in self.tasks[server] if self.documents[task.document].rank == owner]
        prefixes: dict[int, int] = {}
        for task in tasks:
            prefixes[task.document] = max(prefixes.get(task.document, 0), task.stop)
        return tasks, prefixes


# ---------------------------------------------------------------------- the planner


@dataclass(frozen=True)
class _Item:
    """Queries [a, b) of a document of n tokens and their mirror [n - b, n - a); b reaches to the middle, rounded up."""

    document: int
    n: int
    a: int
    b: int

    def tasks(self) -> list[Task]:
        if 2 * self.b >= self.n:
            return [Task(self.document, self.a, self.n - self.a)]
        return [Task(self.document, self.a, self.b), Task(self.document, self.n - self.b, self.n - self.a)]

    @property
    def work(self) -> int:
        lone = 2 * self.b > self.n  # the middle of an odd document is its own mirror
        return (self.b - self.a) * (self.n + 1) - lone * (self.n + 1) // 2

    def part(self, most: float, block: int) -> _Item | None:
        """The innermost queries, both sides, whose work is at most `most`; None if not even one block's is."""
        lone = 0.5 if 2 * self.b > self.n else 0.0
        pairs = min(int(most / (self.n + 1) + lone) // block * block, self.b - self.a)
        return _Item(self.document, self.n, self.b - pairs, self.b) if pairs > 0 else None

    def bytes(self, shape: Shape) -> int:
        return sum(task.stop - task.start for task in self.tasks()) * shape.query + (self.n - self.a) * shape.key


def plan_attention(
    lengths: Sequence[Sequence[int]], *, tolerance: float = 0.1, block: int = 1, shape: Shape | None = None
) -> Plan:
    """Spread the attention of documents, `lengths[rank]` in tokens, evenly over their ranks.

    Greedy and deterministic, so that every rank computes the same plan: the rank with the largest deficit takes the cheapest item in
    bytes for its work, whole or cut, until no rank is further than `tolerance` (0.1, the paper's) of the mean from it. `block`: queries
    are cut off in multiples of it (1 as in the paper's planner; 128 keeps whole tiles of a kernel). The busiest rank ends at most
    (1 + tolerance) of the mean, or one smallest cut above the mean. `shape`: bytes of a token, `Shape()` unless given.
    Raises `InputError` for empty documents and values out of range.
    """
    _check_lengths(lengths)
    if not 0 <= tolerance < 1 or not isinstance(block, int) or block < 1:
        raise InputError(
            f"expected a tolerance from 0 below 1 and blocks of whole tokens from 1, got {tolerance} and {block}; change them"
        )
    shape = shape or Shape()
    documents, held = [], [[] for _ in lengths]
    for rank, some in enumerate(lengths):
        start = 0
        for n in some:
            held[rank].append(_Item(len(documents), n, 0, (n + 1) // 2))
            documents.append(Document(rank, start, n))
            start += n
    _level(held, tolerance, block, shape)
    tasks = tuple(
        tuple(sorted((t for item in items for t in item.tasks()), key=lambda t: (t.document, t.start)))
        for items in held
    )
    return Plan(tuple(documents), tasks, shape)


def _check_lengths(lengths: Sequence[Sequence[int]]) -> None:
    """Raise `InputError` unless every rank has a list of documents with tokens, and some rank a document."""
    listed = all(isinstance(some, Sequence) and not isinstance(some, str) for some in lengths)
    if not listed or not any(lengths) or any(not isinstance(n, int) or n < 1 for some in lengths for n in some):
        raise InputError(
            f"expected for each rank a list of documents of at least 1 token, and one on some rank, got {lengths!r:.100}; drop empty ones"
        )


def _level(held: list[list[_Item]], tolerance: float, block: int, shape: Shape) -> None:
    """Move items between ranks, in place, until their work is level."""
    work = [sum(item.work for item in items) for items in held]
    mean = sum(work) / len(work)
    over = [w - mean for w in work]

    def move(givers: Sequence[int], taker: int, most: Callable[[int, _Item], float]) -> bool:
        """The cheapest piece of at most so much work goes from one of the givers to the taker; False if there is none."""
        found = []
        for giver in givers:
            for item in held[giver]:
                piece = item if item.work <= most(giver, item) else item.part(most(giver, item), block)
                if piece is not None:
                    found.append((piece.bytes(shape) / piece.work, giver, item.document, item.a, item, piece))
        if not found:
            return False
        _, giver, _, _, item, piece = min(found, key=lambda x: x[:4])
        held[giver].remove(item)
        if piece.a > item.a:
            held[giver].append(_Item(item.document, item.n, item.a, piece.a))
        held[taker].append(piece)
        over[giver], over[taker] = over[giver] - piece.work, over[taker] + piece.work
        return True

    for taker in sorted((r for r in range(len(held)) if over[r] < 0), key=lambda r: over[r]):
        # A taker within the tolerance goes on as long as someone else is not.
        while over[taker] < -tolerance * mean or (over[taker] < 0 and max(over) > tolerance * mean):
            givers = [r for r in range(len(held)) if over[r] > 0]
            if not move(givers, taker, lambda giver, item, taker=taker: min(-over[taker], over[giver])):
                break
    # Every taker may have stopped just short of one cut more: single cuts go on while they lower the busiest rank.
    while max(over) > tolerance * mean:
        giver, taker = over.index(max(over)), over.index(min(over))
        gap = over[giver] - over[taker]
        if not move([giver], taker, lambda _, item, gap=gap: min(block * (item.n + 1), gap - 1)):
            break


def context_parallel(lengths: Sequence[Sequence[int]], *, zigzag: bool = False, shape: Shape | None = None) -> Balance:
    """What plain context parallelism gives for the same documents: all tokens in a row, cut into one equal run for each rank.

    `zigzag` cuts every document by itself into head and tail slices for every rank: even, and each rank needs the keys of all.
    Bytes are the keys and values that ranks fetch from others. Raises `InputError` for empty documents.
    """
    _check_lengths(lengths)
    shape, ranks = shape or Shape(), len(lengths)
    flat = [n for some in lengths for n in some]
    total, work, fetched = sum(flat), [0] * ranks, 0
    start = 0
    for n in flat:
        for rank in range(ranks):
            if zigzag:
                cuts = [n * r // (2 * ranks) for r in range(2 * ranks + 1)]
                slices = [(cuts[rank], cuts[rank + 1]), (cuts[-2 - rank], cuts[-1 - rank])]
            else:
                low, high = (min(max(total * r // ranks - start, 0), n) for r in (rank, rank + 1))
                slices = [(low, high)]
            slices = [s for s in slices if s[1] > s[0]]
            work[rank] += sum(Task(0, *s).work for s in slices)
            if slices:
                fetched += max(stop for _, stop in slices) - sum(stop - first for first, stop in slices)
        start += n
    return Balance(tuple(work), fetched * shape.key)


# ---------------------------------------------------------------------- the work itself


class _Exchange(torch.autograd.Function):
    """All-to-all of flat tensors by sizes; its gradient travels the way back."""

    @staticmethod
    def forward(ctx, flat: Tensor, sent: list[int], received: list[int], group) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(flat, sent, received, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        sent, received = ctx.sizes
        return _all_to_all(grad, received, sent, ctx.group), None, None, None


def _all_to_all(flat: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    out = flat.new_empty(sum(received))
    dist.all_to_all_single(out, flat.contiguous(), received, sent, group=group)
    return out


def attend_planned(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None, group=None) -> Tensor:
    """Causal attention of each document of this rank to itself, done where the plan says: every rank of `group` calls it together.

    q `[1, heads, tokens, head_dim]`, k and v with any KV heads: this rank's documents one after another, positions already applied.
    Differentiable; gradients travel back the same way, and each key collects those of all tasks that read it. Returns out
    `[1, heads, tokens, value_dim]`. `scale`: 1 / sqrt(head_dim) unless given. Works with gloo and NCCL. Raises `InputError` if the
    plan is for other ranks or tokens, before anything is sent.
    """
    rank = _check(q, k, v, plan, group)
    ranks, scale = range(plan.ranks), q.shape[-1] ** -0.5 if scale is None else scale
    out_going = [plan.message(rank, server) for server in ranks]
    incoming = [plan.message(owner, rank) for owner in ranks]
    rows = [t[0].transpose(0, 1) for t in (q, k, v)]  # [tokens, heads, width]
    widths = [t.shape[1] * t.shape[2] for t in rows]
    # 1: queries and key prefixes to the rank of the task.
    parcels, places = [], []
    for tasks, prefixes in out_going:
        query = _tokens([(t.document, t.start, t.stop) for t in tasks], plan, q.device)
        key = _tokens([(d, 0, n) for d, n in prefixes.items()], plan, q.device)
        places.append(query)
        parcels += [t[at].flatten() for t, at in zip(rows, (query, key, key), strict=True)]
    flat = _Exchange.apply(
        torch.cat(parcels), [_load(m, widths) for m in out_going], [_load(m, widths) for m in incoming], group
    )
    # 2: the tasks, and their results back to the owners.
    results = [flat[:0]]
    for message, parcel in zip(incoming, flat.split([_load(m, widths) for m in incoming]), strict=True):
        results += [o.flatten() for o in _serve(message, parcel, rows, scale)]
    width = q.shape[1] * v.shape[-1]
    counts = [[sum(t.stop - t.start for t in tasks) * width for tasks, _ in m] for m in (incoming, out_going)]
    back = _Exchange.apply(torch.cat(results), *counts, group)
    out = back.view(-1, q.shape[1], v.shape[-1])[torch.cat(places).argsort()]
    return out.transpose(0, 1)[None]


def _serve(message, parcel: Tensor, rows: list[Tensor], scale: float) -> list[Tensor]:
    """Results `[queries, heads, value_dim]` of one owner's tasks, in the order of the message."""
    tasks, prefixes = message
    counts = [sum(t.stop - t.start for t in tasks), sum(prefixes.values()), sum(prefixes.values())]
    sizes = [n * t.shape[1] * t.shape[2] for n, t in zip(counts, rows, strict=True)]
    q, k, v = (
        part.view(-1, *t.shape[1:]).transpose(0, 1)[None] for part, t in zip(parcel.split(sizes), rows, strict=True)
    )
    keys = dict(
        zip(prefixes, zip(k.split([*prefixes.values()], 2), v.split([*prefixes.values()], 2), strict=True), strict=True)
    )
    outs = []
    for task, query in zip(tasks, q.split([t.stop - t.start for t in tasks], 2), strict=True):
        key, value = (t[:, :, : task.stop] for t in keys[task.document])
        # With the log-sum-exp a GPU takes the block kernel, forward and backward; without it, a mask of queries x keys.
        out, _ = attend(query, key, value, scale=scale, need_lse=True)
        outs.append(out[0].transpose(0, 1))
    return outs


def _tokens(ranges: list[tuple[int, int, int]], plan: Plan, device) -> Tensor:
    """Tokens of the owner's rank that ranges (document, start, stop) name."""
    runs = [torch.arange(plan.documents[d].start + a, plan.documents[d].start + b, device=device) for d, a, b in ranges]
    return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64, device=device)


def _load(message, widths: list[int]) -> int:
    """Numbers of a message's queries, keys and values."""
    tasks, prefixes = message
    return sum(t.stop - t.start for t in tasks) * widths[0] + sum(prefixes.values()) * (widths[1] + widths[2])


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, group) -> int:
    if not dist.is_initialized():
        raise InputError("expected a process group, got none; call torch.distributed.init_process_group first")
    if dist.get_world_size(group) != plan.ranks:
        raise InputError(f"expected a plan for {dist.get_world_size(group)} ranks, got one for {plan.ranks}; plan anew")
    rank = dist.get_rank(group)
    tokens = sum(d.length for d in plan.documents if d.rank == rank)
    if any(t.dim() != 4 or t.shape[0] != 1 or t.shape[2] != tokens for t in (q, k, v)) or k.shape[:3] != v.shape[:3]:
        raise InputError(
            f"expected q, k, v [1, heads, {tokens}, head_dim] of rank {rank}'s documents, "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; pack them one after another"
        )
    if not q.dtype == k.dtype == v.dtype or q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(
            f"expected q, k, v of one dtype and head size, and heads a multiple of KV heads, "
            f"got {q.dtype} {list(q.shape)} and {k.dtype} {list(k.shape)}"
        )
    return rank

"""Shared by methods that compress once, when the prompt has been read: when that is, what the last queries look at, and who stays."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ...edits import Keep
from ...errors import InputError
from ...method import Method, check_count


@dataclass(frozen=True)
class PromptKeeper(Method):
    """Base: at the end of the prompt the best `budget` keys of each KV head stay, later tokens are only added.

    A subclass has the fields `budget` and, where it can compress more than once, `rolling`, and says what a key is worth in
    `score`; one that shares out its budget in another way overrides `compress`.
    """

    dense_prefill = True

    def score(self, step, size: int) -> Tensor:
        """What each key is worth, [1, kv_heads, T], when `size` keys may stay; infinite for those that stay in any case."""
        raise NotImplementedError

    def compress(self, step, size: int) -> Keep:
        return keep_best_of(step.store, self.score(step, size), size)

    def keep(self, step) -> Keep | None:
        if not (getattr(self, "rolling", False) and not step.decode) and not prompt_ends(step):
            return None
        size = step.budget(self.budget)
        return None if size >= step.T else self.compress(step, size)


def prompt_ends(step) -> bool:
    """Whether the prompt has just been read and nothing was compressed before it: a text is compressed once.

    A later turn of a conversation, and what is generated, is appended. A prompt in chunks ends with its last chunk.
    """
    if step.decode or not step.prompt_done:
        return False
    return step.pass_.counts[0] == 0 or step.store.all_hold(step.seen())


# ---------------------------------------------------------------------- what the last queries look at


def attention(step, start: int = 0, stop: int | None = None) -> Tensor:
    """Attention weights of the queries start..stop-1 of this step, [batch, heads, queries, T]: exact, over all keys they see."""
    z = step.scores(start=start, stop=stop)
    if step.logit.sinks is None:
        return z.softmax(-1)
    sinks = step.logit.sinks.to(z.dtype).view(1, -1, 1, 1).expand(*z.shape[:3], 1)
    return torch.cat([z, sinks], -1).softmax(-1)[..., :-1]


def observed(step, window: int) -> Tensor:
    """Attention weights of the newest `window` queries of this step, [batch, heads, window, T]."""
    return attention(step, start=max(0, step.L - window))


def newest(step, count: int) -> Tensor:
    """Which slots hold one of the newest `count` tokens, bool [batch, kv_heads, T] (empty slots do not matter)."""
    find = lambda: step.token > step.q_token[:, -1, None, None] - count
    return step.once(("newest", count, step.G, step.T), find) if step.whole else find()


def smoothed(x: Tensor, kernel: int, how: str) -> Tensor:
    """Each key's score and those of its neighbours, [1, rows, T]: "max" or "avg" over `kernel` keys, zero beyond the ends."""
    pool = max_pool1d if how == "max" else avg_pool1d
    return pool(x, kernel, stride=1, padding=kernel // 2)


def check_window(window: int, kernel: int, pooling: str = "avg") -> None:
    """Raise unless the observation window, the smoothing kernel and how it pools make sense."""
    check_count("window", window, 1)
    check_count("kernel", kernel, 1)
    if kernel % 2 == 0:
        raise InputError(
            f"kernel = {kernel}: expected an odd number, so that a key stands in the middle of its neighbours"
        )
    if pooling not in ("max", "avg"):
        raise InputError(f"pooling = {pooling!r}: expected 'max' or 'avg'")


def check_rolling(rolling: bool) -> None:
    if not isinstance(rolling, bool):
        raise InputError(
            f"rolling = {rolling!r}: expected True (compress after every piece that is read) or False (once)"
        )


# ---------------------------------------------------------------------- who stays


def exact(targets: Sequence[float], total: int, low: int, high: Sequence[int]) -> list[int]:
    """Whole numbers near `targets`, each from `low` to its `high`, that add up to `total` where these bounds allow it.

    What rounding and bounds leave over is handed out evenly among those that can still take it, the largest target
    first, and what is too much is taken back evenly, the smallest first.
    """
    out = [min(max(round(x), low), top) for x, top in zip(targets, high, strict=True)]
    by_size = sorted(range(len(out)), key=lambda i: -targets[i])
    total = min(max(total, low * len(out)), sum(high))
    while missing := total - sum(out):
        sign = 1 if missing > 0 else -1
        free = [i for i in by_size[::sign] if (out[i] < high[i] if sign > 0 else out[i] > low)]
        each = max(1, abs(missing) // len(free))
        for i in free[: abs(missing)]:
            step = min(each, high[i] - out[i]) if sign > 0 else min(each, out[i] - low)
            out[i] += sign * step
    return out


def best_of(store, scores: Tensor, counts: Sequence[int]) -> Tensor:
    """The `counts[row]` best keys of each KV head, bool [1, kv_heads, T]; of equal scores, which smoothing makes many, the older key."""
    valid = store.valid
    rank = scores.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < torch.tensor(counts, device=scores.device)[:, None]) & valid


def keep_best_of(store, scores: Tensor, count: int) -> Keep:
    """What stays where each KV head keeps its `count` best keys, chosen as `best_of` does."""
    if store.uniform is None or not 0 < count <= store.uniform:
        return Keep(mask=best_of(store, scores, [count] * store.heads))
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return Keep(slots=best.sort(-1).values)

"""What the tests of methods compare with: queries, keys and values as a model really made them, and attention written out in full."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

import foveal
from foveal.edits import Keep
from foveal.heads import HeadRoles
from foveal.hub import model_identity
from foveal.method import Method
from foveal.store import FAR


class Seq(NamedTuple):
    """One layer of one sequence in float64: q, out [heads, tokens, head_dim], k, v [kv_heads, tokens, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


def hook(planes: dict | None = None, needs: Sequence[str] = (), **hooks: Callable) -> Method:
    """A method made on the spot: hook(select=lambda step: Band(2, 4)), with the planes and statistics it wants."""
    body = {name: (lambda self, *args, f=f: f(*args)) for name, f in hooks.items()}
    return type("Hook", (Method,), {**body, "name": "hook", "planes": planes or {}, "needs": frozenset(needs)})()


class Watched(NamedTuple):
    """seqs[b][layer]; kept[call][layer][b][kv_head]: token ids held after each forward call; planes[name][layer] at the end."""

    seqs: list[list[Seq]]
    kept: list[list[list[list[list[int]]]]]
    cache: foveal.Store
    planes: dict[str, list[Tensor]]

    def each(self):
        """(sequence, layer, Seq), all of them."""
        return ((b, i, s) for b, layers in enumerate(self.seqs) for i, s in enumerate(layers))


def watch(model, method, ids: Tensor, chunks: Sequence[int], pads: Sequence[int] | None = None) -> Watched:
    """Read ids [batch, columns] as a prompt in chunks, then token by token, and write down what every layer did.

    pads: columns of left padding of each sequence (one chunk only).
    """
    log: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def note(step, out):
        log.append((step.layer, step.q, step.k_new, step.v_new, out))
        return out

    batch, columns = ids.shape
    mask = None if pads is None else (torch.arange(columns) >= torch.tensor(pads)[:, None]).long()
    pieces = [*chunks, *[1] * (columns - sum(chunks))]
    parts: dict[tuple[int, int], list] = {}
    kept, cache, at = [], None, 0
    watcher = hook(mix=note)
    with torch.no_grad(), foveal.attach(model, watcher if method is None else method | watcher) as session:
        for call, n in enumerate(pieces):
            session._more = call < len(chunks) - 1
            now = None if mask is None else mask[:, : at + n]
            where = None if mask is None else (now.cumsum(-1) - 1).clamp(min=0)[:, -n:]
            cache = model(
                ids[:, at : at + n], past_key_values=cache, attention_mask=now, position_ids=where
            ).past_key_values
            at += n
            _sort(log, parts, batch)
            kept.append([_held(rows) for rows in cache.rows])
    layers = sorted({i for _, i in parts})
    seqs = [
        [Seq(*(torch.cat(x, 1).double() for x in zip(*parts[b, i], strict=True))) for i in layers] for b in range(batch)
    ]
    planes = {n: [r.plane(n) for r in cache.rows] for n in ("token", "key", "value", *cache.rows[0].specs)}
    return Watched(seqs, kept, cache, planes)


def _sort(log: list, parts: dict, batch: int) -> None:
    """Prefill comes one sequence at a time, decode as a batch: both end up by sequence and layer."""
    count: dict[int, int] = {}
    for layer, *tensors in log:
        first = count.get(layer, 0)
        for row in range(tensors[0].shape[0]):
            parts.setdefault((first + row, layer), []).append([x[row] for x in tensors])
        count[layer] = first + tensors[0].shape[0]
    assert all(n == batch for n in count.values())
    log.clear()


def _held(rows) -> list[list[list[int]]]:
    return [[sorted(t for t in row if t != FAR) for row in heads] for heads in rows.token.tolist()]


# ---------------------------------------------------------------------- attention in full


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def over_heads(x: Tensor, heads: int) -> Tensor:
    """[1 or kv_heads or heads, ...] over `heads`."""
    return x.repeat_interleave(heads // x.shape[0], 0)


def logits(s: Seq, scale: float | None = None) -> Tensor:
    """[heads, queries, keys], nothing hidden."""
    return s.q @ over_heads(s.k, s.q.shape[0]).mT * (s.q.shape[-1] ** -0.5 if scale is None else scale)


def weights(s: Seq, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention weights [heads, queries, keys]; visible [1 or kv_heads or heads, queries, keys]. Rows that see nothing are zero."""
    z = (logits(s) + bias).masked_fill(~over_heads(visible, s.q.shape[0]), -math.inf)
    return z.softmax(-1).nan_to_num(0.0)


def attend(s: Seq, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Outputs [heads, queries, head_dim]."""
    return weights(s, visible, bias) @ over_heads(s.v, s.q.shape[0])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and (a.double() - b.double()).abs().max().item() <= tolerance


# ---------------------------------------------------------------------- ragged rows


def stays(token: Tensor, head: Tensor | int) -> Tensor:
    """The rule of `thin`: KV head 0 lets go of every other token, head 1 of every third, and so on."""
    return token % (head + 2) != 1


def thin() -> Method:
    """Make the rows of a prompt ragged."""

    def keep(step) -> Keep | None:
        return None if step.decode else Keep(mask=stays(step.token, torch.arange(step.G)[:, None]))

    return hook(keep=keep)


def thinned(n: int, chunks: Sequence[int], kv_heads: int) -> Tensor:
    """What each query of `thin` can see, [kv_heads, n, n]: chunks are whole to themselves, what is past is thinned."""
    first = torch.zeros(n, dtype=torch.long)
    at = 0
    for c in chunks:
        first[at : at + c] = at
        at += c
    first[at:] = at  # decode: only the prompt was thinned
    token = torch.arange(n)
    rule = torch.stack([stays(token, g) for g in range(kv_heads)])
    return causal(n) & (rule[:, None, :] | (token[None, :] >= first[:, None]))


# ---------------------------------------------------------------------- head roles


def role_file(model, folder, **scores: Tensor) -> str:
    """A role file of this model: scores [layers, heads] by name."""
    path = folder / "roles.json"
    HeadRoles(model_identity(model), scores, {"made": "for tests"}).save(path)
    return str(path)


# ---------------------------------------------------------------------- heavy hitters


def simulate_h2o(
    s: Seq,
    prompt: int | Sequence[int],
    budget: float,
    recent: float,
    seen: Tensor | None = None,
    bias: Tensor | float = 0.0,
):
    """H2O by masking columns: (visible [kv_heads, n, n], kept token ids after each call, accumulated mass [kv_heads, n]).

    prompt: its length, or the lengths of its chunks, after each of which keys are dropped.  seen [heads, n, n]: what a selection allows.
    """
    n, heads, kv_heads = s.q.shape[1], s.q.shape[0], s.k.shape[0]
    visible = causal(n).expand(kv_heads, -1, -1).clone()
    allowed = torch.ones(heads, n, n, dtype=torch.bool) if seen is None else seen
    mass, kept, gone = torch.zeros(kv_heads, n).double(), [], torch.zeros(kv_heads, n, dtype=torch.bool)
    ends = [prompt] if isinstance(prompt, int) else list(accumulate(prompt))
    for first, last in pairwise([0, *ends, *range(ends[-1] + 1, n + 1)]):
        rows = slice(first, last)
        visible[:, rows] &= ~gone[:, None]
        w = weights(s, over_heads(visible, heads) & allowed, bias)[:, rows]
        mass += w.sum(1).unflatten(0, (kv_heads, -1)).sum(1)
        size = budget if isinstance(budget, int) else math.ceil(budget * last)
        for g in range(kv_heads):
            held = [t for t in range(last) if not gone[g, t]]
            over = len(held) - size
            older = [t for t in held if t < last - int(size * recent)]
            # all that is too much after the prompt, one key in a decode step
            for t in sorted(older, key=lambda t: mass[g, t].item())[: max(0, over if last in ends else min(over, 1))]:
                gone[g, t] = True
        kept.append([[t for t in range(last) if not gone[g, t]] for g in range(kv_heads)])
    return visible, kept, mass

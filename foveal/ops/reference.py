"""What the prefill operations mean: full logits, full mask, softmax, in float64. Tests compare to these."""

import math
from itertools import pairwise

import torch
from torch import Tensor


def causal(length: int, total: int, device=None) -> Tensor:
    """Lower-right aligned causal visibility, bool `[length, total]`: query i sees keys j <= i + total - length."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)


def band(length: int, total: int, sink: list[int], recent: list[int]) -> Tensor:
    """Visibility of one band per head, bool `[heads, length, total]`: causal and (j < sink or i - j < recent)."""
    i = torch.arange(total - length, total)[:, None]
    j = torch.arange(total)[None]
    heads = [(j < s) | (i - j < r) for s, r in zip(sink, recent, strict=True)]
    return torch.stack(heads) & causal(length, total)


def blocks(length: int, total: int, block_map: Tensor, size: int) -> Tensor:
    """Visibility of a block map `[batch, heads, nq, nk]` of blocks of `size`, bool `[batch, heads, length, total]`."""
    full = block_map.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., :length, :total]
    return full & causal(length, total, block_map.device)


def logits(q, k, *, scale, softcap=None, bias=None, mass=None, visible=None) -> Tensor:
    """All logits `[batch, heads, length, total]` in float64, -inf where a query does not see a key."""
    heads = q.shape[1]
    x = q.double() @ _per_head(k, heads).transpose(-1, -2) * scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if bias is not None:
        phi_q, phi_k = bias
        x = x + phi_q.double() @ _per_head(phi_k, heads).transpose(-1, -2)
    if mass is not None:
        x = x + _per_head(mass, heads).log()[:, :, None]
    see = causal(x.shape[-2], x.shape[-1], x.device)
    return x.masked_fill(~(see if visible is None else see & visible), -math.inf)


def attend(q, k, v, *, scale, softcap=None, sinks=None, bias=None, mass=None, visible=None) -> tuple[Tensor, Tensor]:
    """Attention output `[batch, heads, length, value_dim]` and log-sum-exp `[batch, heads, length]`, in float64.

    `visible` is a bool mask that broadcasts to `[batch, heads, length, total]` and narrows the causal one.
    """
    x = logits(q, k, scale=scale, softcap=softcap, bias=bias, mass=mass, visible=visible)
    lse = torch.logsumexp(x, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[None, :, None].expand_as(lse))
    return probabilities(x, lse) @ _per_head(v, q.shape[1]), lse


def probabilities(x: Tensor, lse: Tensor) -> Tensor:
    """exp(logit - lse), 0 wherever nothing is visible."""
    return torch.where(x.isneginf(), 0.0, (x - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp())


def attention_stats(
    q, k, lse, *, scale, softcap=None, bias=None, mass=None, sink=4, rows=None, visible=None
) -> dict[str, Tensor]:
    """Every statistic of `foveal.ops.stats.attention_stats`, from the full probability matrix, in float64."""
    length, total = q.shape[2], k.shape[2]
    start, stop = rows or (0, length)
    x = logits(q, k, scale=scale, softcap=softcap, bias=bias, mass=mass, visible=visible)[:, :, start:stop]
    p = probabilities(x, lse.double()[:, :, start:stop])
    seen = ~x.isneginf()
    count = seen.sum(-1, keepdim=True)
    i = torch.arange(total - length + start, total - length + stop, device=q.device)[:, None]
    distance = (i - torch.arange(total, device=q.device)[None]).double()
    top, where = p.max(-1)
    return {
        "col_mass": p.sum(-2),
        "col_low": (seen & (p * count < 1 - 1e-5)).sum(-2).double(),
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "sink_mass": p[..., :sink].sum(-1),
        "mean_distance": (p * distance).sum(-1),
        "row_max": top,
        "row_argmax": where,
    }


def _per_head(t: Tensor, heads: int) -> Tensor:
    return t.double().repeat_interleave(heads // t.shape[1], 1)


def where_it_lies(
    q, k, lse, *, scale, softcap=None, bias=None, mass=None, rows=None, edges, block=64, top=8, threshold=0.01
) -> dict[str, Tensor]:
    """`offset_histogram`, `block_map`, `top_k`, `top_k_keys` of `foveal.ops.stats.attention_stats`, and `col_low` under
    a threshold, from the full probability matrix, in float64."""
    length, total = q.shape[2], k.shape[2]
    start, stop = rows or (0, length)
    x = logits(q, k, scale=scale, softcap=softcap, bias=bias, mass=mass)[:, :, start:stop]
    p = probabilities(x, lse.double()[:, :, start:stop])
    distance = torch.arange(total - length + start, total - length + stop)[:, None] - torch.arange(total)[None]
    bounds = [*edges, math.inf]
    bins = [(distance >= a) & (distance < b) for a, b in pairwise(bounds)]
    cells = [[part.sum((-2, -1)) for part in line.split(block, -1)] for line in p.split(block, -2)]
    largest, keys = torch.sort(p, dim=-1, descending=True, stable=True)
    largest, keys = (torch.cat([t, t.new_zeros(*t.shape[:-1], top)], -1)[..., :top] for t in (largest, keys))
    return {
        "offset_histogram": torch.stack([(p * inside).sum((-2, -1)) for inside in bins], -1),
        "block_map": torch.stack([torch.stack(line, -1) for line in cells], -2)[..., : -(-(stop - start) // block), :],
        "top_k": largest,
        "top_k_keys": keys.masked_fill(largest == 0, -1),
        "col_low": ((p < threshold) & ~x.isneginf()).sum(-2).double(),
    }

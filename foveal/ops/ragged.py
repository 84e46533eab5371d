"""Decode attention: one query per head over its own list of keys.

The group's queries of one KV head are packed, so a row is a small matrix product: [group, head_dim] x [head_dim, keys]. This gives
the weights and the log-sum-exp for free, which is why statistics of a decode step cost almost nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dense import wide


class Logit(NamedTuple):
    """How a model turns query . key into a logit: scale, optional soft-cap, optional learned sink logits [heads]."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


class Attended(NamedTuple):
    """out [rows, group, value_dim]; weights [rows, group, keys] and lse [rows, group] where they were asked for."""

    out: Tensor
    weights: Tensor | None
    lse: Tensor | None


def attend_padded(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    logit: Logit,
    *,
    extra: Tensor | None = None,
    hidden: Tensor | None = None,
    need_lse: bool = False,
    may_be_blind: bool = False,
) -> Attended:
    """Packed rows of decode attention.

    q: [rows, group, head_dim].  key: [rows, keys, head_dim].  value: [rows, keys, value_dim].  extra: added to the logits after scaling
    and soft-cap, broadcast to [rows, group, keys].  hidden: bool, broadcast likewise, True where a key is not seen.
    logit.sinks: [rows, group] here.  may_be_blind: some row may see no key at all; its output is then zero and its log-sum-exp -inf.
    Softmax in float32 or wider.
    """
    z = logits(q, key, logit, extra=extra, hidden=hidden)
    if logit.sinks is None and not need_lse and not may_be_blind:
        weights, lse = torch.softmax(z, -1), None
    else:
        lse = z.logsumexp(-1)
        if logit.sinks is not None:
            lse = torch.logaddexp(lse, logit.sinks.to(z.dtype))
        # a row that sees nothing has a log-sum-exp of -inf, and -inf - -inf would be NaN
        weights = (z - lse.clamp(min=torch.finfo(z.dtype).min)[..., None]).exp_()
    return Attended(torch.bmm(weights.to(value.dtype), value), weights, lse)


def attend_rows(q: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The plain case of `attend_padded`: every key visible, nothing but the output wanted. Shapes as there."""
    if q.is_cuda:
        out = torch.nn.functional.scaled_dot_product_attention(q[None], key[None], value[None], scale=scale)
        return out[0].contiguous()  # some of its kernels return heads and queries swapped in memory
    z = torch.bmm(q * scale, key.mT)
    return torch.bmm(torch.softmax(z, -1, dtype=wide(z.dtype)).to(value.dtype), value)


def logits(
    q: Tensor, key: Tensor, logit: Logit, *, extra: Tensor | None = None, hidden: Tensor | None = None
) -> Tensor:
    """Scaled logits [rows, group, keys] in float32 or wider, with everything that counts: soft-cap, then `extra`, then `hidden`."""
    z = torch.bmm(q * logit.scale, key.mT)
    z = z.to(wide(z.dtype))
    if logit.softcap is not None:
        z = logit.softcap * torch.tanh(z / logit.softcap)
    if extra is not None:
        z = z + extra
    if hidden is not None:
        z = z.masked_fill(hidden, -math.inf)
    return z

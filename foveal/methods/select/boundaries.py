"""Where a text falls into chunks: a small network that sees the keys around a gap, its labels out of attention, the choice of gaps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WINDOW = 4
"""Tokens looked at on either side of a gap (the paper's w)."""
ALPHA, BETA = 2.0, 2.0
"""Steepness of the soft label, and the ratio that counts as a boundary (the paper's)."""
ROUNDS = 4
"""Rounds of choosing starts before the host asks whether any is left; prose of 2,048 tokens takes 3 to 5."""


class BoundaryPredictor(nn.Module):
    """Scores every gap of a text from `window` keys on its left and on its right, all KV heads concatenated, before rotary positions.

    channels: kv_heads * head_dim. One self-attention of 8 heads (or as many as divide the channels) over the 2 * window tokens, a mean of
    each side, and a network of 256 hidden units over [l, r, |l - r|, l * r, cos(l, r)].
    """

    def __init__(self, channels: int, window: int = WINDOW):
        super().__init__()
        self.window = window
        heads = next(n for n in (8, 4, 2, 1) if channels % n == 0)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.hidden, self.last = nn.Linear(4 * channels + 1, 256), nn.Linear(256, 1)

    def forward(self, keys: Tensor) -> Tensor:
        """Logits [tokens - 2 * window + 1] of the gaps before tokens window .. tokens - window; keys [tokens, channels]."""
        w = self.window
        x = keys.unfold(0, 2 * w, 1).transpose(1, 2)  # [gaps, 2 * window, channels]
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        left, right = x[:, :w].mean(1), x[:, w:].mean(1)
        near = nn.functional.cosine_similarity(left, right, dim=-1)[:, None]
        both = torch.cat([left, right, (left - right).abs(), left * right, near], -1)
        return self.last(nn.functional.gelu(self.hidden(both)))[:, 0]


@torch.no_grad()
def gap_scores(predictor: BoundaryPredictor, keys: Tensor) -> Tensor:
    """The score of a chunk that begins at each token, [tokens], -inf where the window does not fit; keys [tokens, channels]."""
    w, length = predictor.window, keys.shape[0]
    out = torch.full((length,), -torch.inf, device=keys.device)
    dtype = predictor.last.weight.dtype
    few = max(2 * w, (1 << 21 if keys.device.type == "cpu" else 1 << 26) // (2 * w * keys.shape[1]))
    for start in range(w, length - w + 1, few):
        stop = min(start + few, length - w + 1)
        out[start:stop] = predictor(keys[start - w : stop + w - 1].to(dtype)).float()
    return out


def boundary_ratio(weights: Tensor, window: int = WINDOW) -> Tensor:
    """How unevenly later queries look at both sides of each gap, [tokens]: at token t, that of the gap before t; 1 near the ends.

    weights: attention averaged over heads, [tokens, tokens]. With P and F what all queries more than `window` after the gap give to the
    `window` keys before and after it, the ratio is the larger over the smaller.
    """
    n, w = weights.shape[0], window
    later = weights.sum(0, keepdim=True) - weights.cumsum(0)  # [query, key]: what queries after this one give the key
    running = nn.functional.pad(later.cumsum(1), (1, 0))
    out = weights.new_ones(n)
    t = torch.arange(2 * w, n - 2 * w + 1, device=weights.device)
    if len(t) == 0:
        return out
    row = t - 1 + w
    before, after = running[row, t] - running[row, t - w], running[row, t + w] - running[row, t]
    eps = 1e-6
    out[t] = (torch.maximum(before, after) + eps) / (torch.minimum(before, after).clamp(min=0) + eps)
    return out


def soft_label(ratio: Tensor) -> Tensor:
    """0 to 1, a half where the ratio is `BETA`."""
    return torch.sigmoid(ALPHA * (ratio.log() - torch.tensor(BETA).log()))


def best_starts(scores: Tensor, count: int, distance: int) -> Tensor:
    """The `count` best starts, bool [tokens], none nearer than `distance` to a better one; of equals the earlier is better.

    The same as taking the best start, striking out its neighbours, taking the best of the rest, and so on. scores: [tokens], -inf = never.
    """
    order = scores.argsort(descending=True, stable=True)
    # no two alike, and exact for the first 2**24 tokens
    worth = torch.arange(len(order), 0, -1, dtype=torch.float32, device=order.device)
    left = torch.empty_like(worth).scatter_(0, order, worth).mul_(scores > -torch.inf)
    chosen = torch.zeros_like(left)
    while True:
        for _ in range(ROUNDS):  # with nothing left one changes nothing, and costs less than a wait for the device
            peak = left * (left == _around(left, distance))
            chosen += peak
            left = left * (_around(peak, distance) == 0)
        if not bool(left.any()):
            break
    best = chosen.topk(min(count, len(order)))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, best.indices, best.values > 0)


def _around(x: Tensor, distance: int) -> Tensor:
    """The largest of each number [tokens] and those nearer to it than `distance`."""
    return nn.functional.max_pool1d(x[None, None], 2 * distance - 1, stride=1, padding=distance - 1)[0, 0]

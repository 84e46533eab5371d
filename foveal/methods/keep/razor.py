"""RazorAttention: retrieval heads keep everything; in the others the dropped span lives on as one compensation token."""

from dataclasses import dataclass

import torch

from ...edits import Keep, Leave, Plane
from ...heads import HeadRoles, roles_for
from ...method import Method, check_count, check_range, method
from ...verify import Beats, BytesAtMost, Claim, StaysNear
from .by_head import HeadPlan, check_share, outside, whole_share


@method(
    "razor",
    paper="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (2024) [138]",
    claim=Claim(
        "Over 70 % of the cache goes at near-equal recall when 15 % of the heads stay whole and the rest get a compensation token.",
        number="Qwen 1.5, Llama 2 and 3, Baichuan 2, 8k to 100k tokens: 32 % of the cache kept (0.15 + 0.85 / 5), needles near dense",
        experiments=(
            StaysNear("razor(least=64)", "needle", within=0.1),
            Beats("razor(least=64)", "razor(least=64, roles='{random}')", "needle", by=0.2),
            BytesAtMost("razor(least=64)", 0.32),
        ),
        setting="the buffer is a fifth of the text without the floor of 4,000 keys, which would keep all of a short text",
    ),
)
@dataclass(frozen=True)
class Razor(Method):
    """Heads that copy over distance (the `echo` share by echo score and the `induction` share by induction score) keep every key. The
    others keep `sink` first keys and a buffer of the newest max(`least`, tokens / `compress`); what lies between becomes one key and value,
    their mean, that counts as many tokens as it stands for (the plane `mass`).

    Defaults are the paper's (1 % + 14 % of the query heads, 4 sinks, buffer of at least 4,000, fifth of the text). A KV head stays whole
    when any of its query heads qualifies. budget: a share of the cache instead; half of it goes to whole KV heads (at most 15 % of them).
    Dropping begins with the oldest non-sink key, which thereby turns into the compensation token.
    """

    budget: float | None = None
    echo: float = 0.01
    induction: float = 0.14
    sink: int = 4
    least: int = 4000
    compress: float = 5.0
    roles: str | None = None

    planes = {"mass": Plane(1.0)}
    dense_prefill = True

    def __post_init__(self) -> None:
        check_share("razor", self.budget)
        check_range("echo", self.echo, 0, 1)
        check_range("induction", self.induction, 0, 1)
        check_count("sink", self.sink)
        check_count("least", self.least, 1)
        check_range("compress", self.compress, 1)

    def setup(self, model) -> HeadPlan:
        roles = roles_for(model.model, self.roles)
        if self.budget is None:
            whole = roles.top_share("echo", self.echo) | roles.top_share("induction", self.induction)
            return HeadPlan.of(whole.unflatten(1, (model.kv_heads, -1)).any(-1), model, None)
        whole = self._best_kv_heads(roles, whole_share(self.budget, 0.15), model.kv_heads)
        return HeadPlan.of(whole, model, self.budget)

    def _best_kv_heads(self, roles: HeadRoles, share: float, kv_heads: int) -> torch.Tensor:
        """`share` of all KV heads: by echo and by induction in the paper's proportion."""
        by_echo = roles.top_share("echo", share * self.echo / max(self.echo + self.induction, 1e-9), kv_heads)
        induction = roles.kv("induction", kv_heads).masked_fill(by_echo, float("inf"))
        count = max(round(share * induction.numel()), int(by_echo.sum()))
        best = torch.zeros(induction.numel(), dtype=torch.bool)
        best[induction.flatten().topk(count).indices] = True
        return best.view_as(induction)

    def _held(self, step):
        """Keys another head holds: sinks, the compensation token and the buffer."""
        if self.budget is not None:
            return step.budget(step.plan.window, least=self.sink + 2)
        buffer, ends = step.budget(1 / self.compress, least=self.least), self.sink + 1
        return buffer + ends if isinstance(buffer, int) else step.once(("razor", self), lambda: buffer + ends)

    def keep(self, step) -> Keep | Leave | None:
        others = step.plan.others[step.layer]
        if not others or not step.prompt_done:
            return None
        held = self._held(step)
        if step.decode:  # the compensation token is the oldest key that is no sink; the key after it is folded in
            return Leave(held, after=self.sink, heads=others, fold=True)
        if isinstance(held, int) and held >= step.T:
            return None
        token = step.token
        seed = step.oldest(after=self.sink)
        first = token.gather(2, seed[..., None])
        newest = step.q_token[:, -1, None, None] - (held - self.sink - 1)
        return Keep(mask=outside(step, others, (token > first) & (token <= newest)), into=seed)

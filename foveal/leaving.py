"""One key of each row leaves by a rule: in one launch where the store's pages allow it, else by slots that are found here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .edits import Keep, Leave
from .ops.leave import Leaving, leave_route, leaver
from .store import FAR, LayerStore

if TYPE_CHECKING:
    from .step import Step


def let_one_go(step: Step, rule: Leave, certain: bool) -> Tensor | None:
    """Do what a rule says; with `by_token` the token id that left each sequence, int32 [batch], -1 for none.

    certain: every row holds one key too many.
    """
    what = in_one_launch(step.store, rule)
    if what is not None:
        return _launch(step.store, rule, what)
    keep, left = _by_slots(step, rule, certain)
    step.store.apply(keep)
    return left


def in_one_launch(store: LayerStore, rule: Leave) -> Leaving | None:
    """What the operation takes, where one launch can do it: pages without positions of their own or pooled pages."""
    c = store.single
    if c is None or not c.paged or c.pages or "shift" in store.specs:
        return None
    what = c.leaving(rule, store.heads, None if rule.heads is None else store.named(rule.heads))
    return what if leave_route(what).name == "triton" else None


def _launch(store: LayerStore, rule: Leave, what: Leaving) -> Tensor | None:
    c, certain = store.single, None
    spared = rule.after + rule.recent + rule.fold if isinstance(rule.recent, int) else None
    known = not c.fixed and c.host is not None and rule.gone is None and isinstance(rule.allowed, int)
    if known and spared is not None and rule.allowed >= spared:  # so that a row with more keys has one that may leave
        acts = range(store.heads) if rule.heads is None else rule.heads
        certain = [n > rule.allowed and row % store.heads in acts for row, n in enumerate(c.host)]
    return c.leave(what, certain)


def _by_slots(step: Step, rule: Leave, certain: bool) -> tuple[Keep, Tensor | None]:
    """The slots that leave by a rule, and the token id that does where all heads let go of the same."""
    token = step.token
    score = None if rule.score is None else step.store.plane(rule.score)
    if rule.by_token is not None:
        at = token.clamp(max=rule.by_token.shape[1] - 1).long().flatten(1)
        score = rule.by_token.gather(1, at).view_as(token)
    how = {"after": rule.after, "recent": rule.recent, "score": score, "fold": rule.fold}
    slot, into = leaver(token, step.q_token[:, -1:], **how)
    if certain and rule.by_token is None:
        return Keep(drop=slot, heads=rule.heads, into=into), None
    slot = slot.where(step.store.len > rule.allowed, -1)
    if rule.gone is not None:
        hit = (token == rule.gone[:, None, None]) & (token != FAR)
        slot = hit.int().argmax(-1).where(hit.any(-1), slot)
    keep = Keep(drop=slot, heads=rule.heads, into=into, optional=True)
    if rule.by_token is None:
        return keep, None
    return keep, token.gather(2, slot.clamp(min=0)[..., None])[:, 0, 0].where(slot[:, 0] >= 0, -1)

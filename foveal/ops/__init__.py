"""Operations: meaning first, speed second. `reference` defines each of them; the others must agree with it."""

from .blocks import attend_blocks
from .dense import attend, merge
from .pages import Pages, attend_ragged
from .prefill import attend_band, attend_masked
from .ragged import attend_padded
from .route import Route, which
from .stats import attention_stats

__all__ = [
    "Pages",
    "Route",
    "attend",
    "attend_band",
    "attend_blocks",
    "attend_masked",
    "attend_padded",
    "attend_ragged",
    "attention_stats",
    "merge",
    "which",
]

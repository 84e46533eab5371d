"""Operations: meaning first, speed second. `reference` defines each of them; the others must agree with it."""

from .blocks import attend_blocks
from .dense import attend, merge
from .prefill import attend_band, attend_masked
from .ragged import attend_ragged
from .stats import attention_stats

__all__ = [
    "attend",
    "attend_band",
    "attend_blocks",
    "attend_masked",
    "attend_ragged",
    "attention_stats",
    "merge",
]

"""Operations: meaning first, speed second. `reference` defines each of them; the others must agree with it."""

from .block_lists import BlockLists
from .blocks import attend_blocks
from .boxes import attend_boxes
from .dense import attend
from .few import few_slots
from .index import index_flat, index_two_stage
from .leave import Leaving, leave_page_keys
from .merge import merge, merge_many
from .numbers import checked_numbers
from .paged_attention import attend_ragged
from .pages import Pages
from .prefill import attend_band, attend_masked
from .ragged import attend_padded
from .reweigh import reweigh_small
from .route import Route, which
from .scores import antidiagonal_scores, page_bound, partial_scores, pool_blocks, pooled_scores, window_scores
from .stats import attention_stats
from .tokens import attend_tokens
from .top import marked_slots, top_blocks, top_slots
from .tree import tree_search
from .votes import attend_renumbered, drop_least, vote_slots

__all__ = [
    "BlockLists",
    "Leaving",
    "Pages",
    "Route",
    "antidiagonal_scores",
    "attend",
    "attend_band",
    "attend_blocks",
    "attend_boxes",
    "attend_masked",
    "attend_padded",
    "attend_ragged",
    "attend_renumbered",
    "attend_tokens",
    "attention_stats",
    "checked_numbers",
    "drop_least",
    "few_slots",
    "index_flat",
    "index_two_stage",
    "leave_page_keys",
    "marked_slots",
    "merge",
    "merge_many",
    "page_bound",
    "partial_scores",
    "pool_blocks",
    "pooled_scores",
    "reweigh_small",
    "top_blocks",
    "top_slots",
    "tree_search",
    "vote_slots",
    "which",
    "window_scores",
]

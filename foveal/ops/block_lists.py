"""Which key blocks each query block sees, as ascending lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.route import no_kernel


@dataclass(frozen=True)
class BlockLists:
    """Which key blocks each query block sees, as lists.

    counts: int32 `[batch, heads, query blocks]`, how many.  indices: int32 `[batch, heads, query blocks, width]`,
    ascending; what lies after the count is not read.  query_block, key_block: tokens of a block; last ones may be partial.
    """

    counts: Tensor
    indices: Tensor
    query_block: int
    key_block: int

    @staticmethod
    def of(block_map: Tensor, query_block: int, key_block: int) -> BlockLists:
        """From a bool map `[batch, heads, query blocks, key blocks]`, on its device and without a host synchronisation."""
        if block_map.dtype != torch.bool or block_map.dim() != 4:
            raise InputError(
                "expected a bool map [batch, heads, query blocks, key blocks], "
                f"got {block_map.dtype} {list(block_map.shape)}; compare the scores with a threshold"
            )
        if no_kernel(block_map) is None:
            from foveal.ops.gpu.blocks_op import block_lists

            return BlockLists(*block_lists(block_map), query_block, key_block)
        blocks = block_map.shape[3]
        column = torch.arange(blocks, device=block_map.device, dtype=torch.int32)
        indices = torch.where(block_map, column, blocks).sort(-1).values
        return BlockLists(block_map.sum(-1, dtype=torch.int32), indices, query_block, key_block)

    @staticmethod
    def band(
        length: int,
        total: int,
        sink: int | Sequence[int],
        recent: int | Sequence[int],
        block: int | tuple[int, int],
        heads: int,
        *,
        batch: int = 1,
        device: torch.device | str | None = None,
    ) -> BlockLists:
        """The blocks that hold any key a band sees: j < sink or i - j < recent, one number for all heads or one each.

        block: tokens, or (query_block, key_block).
        """
        query_block, key_block = (block, block) if isinstance(block, int) else block
        sinks, recents = ([n] * heads if isinstance(n, int) else [int(x) for x in n] for n in (sink, recent))
        if not len(sinks) == len(recents) == heads or min(*sinks, *recents, query_block - 1, key_block - 1) < 0:
            raise InputError(
                f"expected sink and recent from 0 up for {heads} heads and blocks of at least 1 token, "
                f"got {sink}, {recent} and {block}"
            )
        nq, nk = -(-length // query_block), -(-total // key_block)
        bounds = torch.tensor([sinks, recents], device=device).clamp(max=total)[..., None]
        first = total - length + torch.arange(nq, device=device) * query_block  # position of a block's first query
        end = (first + query_block - 1).clamp(max=total - 1) // key_block + 1
        far = (-(-bounds[0] // key_block)).minimum(end)  # blocks of sinks, [heads, nq]
        near = ((first - bounds[1] + 1).clamp(min=0) // key_block).where(bounds[1] > 0, end).maximum(far)
        counts = far + end - near
        most = (
            -(-s // key_block) + (min(r, total) + query_block - 2) // key_block + 2
            for s, r in zip(sinks, recents, strict=True)
        )
        width = max(1, min(nk, max(most)))
        place = torch.arange(width, device=device)
        indices = torch.where(place < far[..., None], place, place + (near - far)[..., None])
        indices = indices.where(place < counts[..., None], nk)
        counts, indices = (t.to(torch.int32).expand(batch, *t.shape).contiguous() for t in (counts, indices))
        return BlockLists(counts, indices, query_block, key_block)

    def map(self, blocks: int) -> Tensor:
        """The bool map `[batch, heads, query blocks, blocks]` of these lists; indices out of range are left out."""
        place = torch.arange(self.indices.shape[3], device=self.indices.device)
        listed = (place < self.counts[..., None]) & (self.indices >= 0) & (self.indices < blocks)
        seen = torch.zeros(*self.counts.shape, blocks + 1, dtype=torch.bool, device=self.counts.device)
        return seen.scatter_(3, self.indices.where(listed, blocks).long(), True)[..., :blocks]

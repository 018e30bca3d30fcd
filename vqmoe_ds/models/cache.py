"""Keys, values and ids of the tokens that a model has read, so that the next one costs the work of one token.

Legend: B batch, P past tokens, S new tokens, K key-value heads, H width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BlockCache:
    """Rotated keys and values of one block, in memory that is taken once.

    Args:
        capacity: tokens at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._kept: tuple[Tensor, Tensor] | None = None

    def position_of(self, new: int) -> int:
        """Position of the first of so many new tokens.

        Raises:
            ValueError: there is no room for them.
        """
        if self.length + new > self.capacity:
            raise ValueError(f"{self.length + new} tokens are more than the cache's {self.capacity}")
        return self.length

    def append(self, k_BKSH: Tensor, v_BKSH: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of new tokens; returns those of all, ``[B, K, P + S, H]``."""
        batch, heads, new, width = k_BKSH.shape
        start, self.length = self.length, self.length + new
        if self._kept is None:
            room = (batch, heads, self.capacity, width)
            self._kept = k_BKSH.new_empty(room), v_BKSH.new_empty(room)
        for kept, fresh in zip(self._kept, (k_BKSH, v_BKSH), strict=True):
            kept[:, :, start : self.length] = fresh
        return self._kept[0][:, :, : self.length], self._kept[1][:, :, : self.length]


class Cache:
    """The cache of a whole model: keys and values of every block, and the ids, which some codes look back at.

    Args:
        blocks: transformer blocks.
        capacity: tokens at most; the model's context is as far as its rotary positions reach.
    """

    def __init__(self, blocks: int, capacity: int) -> None:
        self.blocks = [BlockCache(capacity) for _ in range(blocks)]
        self._ids: list[Tensor] = []
        self.length = 0
        """Tokens read by the passes that are over."""

    def advance(self, tokens_BS: Tensor) -> None:
        """A pass over these tokens is over."""
        # Once per pass and not once per block: sources of all blocks look back from the same position.
        self._ids.append(tokens_BS)
        self.length += tokens_BS.shape[1]

    def with_earlier(self, tokens_BS: Tensor, count: int) -> Tensor:
        """New ids after the last ``count`` ones before them, or as many as there are."""
        # No pass is empty, so the last `count` passes hold as many tokens.
        earlier = torch.cat([*self._ids[-count:], tokens_BS], dim=1) if count else tokens_BS
        return earlier[:, -(count + tokens_BS.shape[1]) :]

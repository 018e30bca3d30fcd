"""Health of the codes of a model, in a few numbers.

Legend: L MoE layers, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqmoe_ds.moe.codebook import CodebookBank


@dataclass(frozen=True)
class CodebookHealth:
    """Use of one codebook, counted over the optimizer steps since ``codebook_health(model, reset=True)``.

    Examples:
        >>> from vqmoe_ds.moe import CodebookHealth
        >>> CodebookHealth(codes=4, used=2, perplexity=2.0, busiest=2.0).used
        2
    """

    codes: int
    used: int
    """Codes that some token chose."""
    perplexity: float
    """``exp`` of the entropy of their use: K where all are used alike, 1 where one takes all; 0 before any step."""
    busiest: float
    """Use of the most used code, as a multiple of the mean."""


def codebook_health(model: nn.Module, reset: bool = False) -> list[CodebookHealth]:
    """Health of every codebook in a module, layer by layer; the same on all ranks after ``StateSync.step``.

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, StateSync, codebook_health
        >>> layer = MoELayer(LayerConfig(width=16, moe=MoEConfig(router="vq", num_experts=4, top_k=0)))
        >>> sync = StateSync(layer)
        >>> outputs = layer(torch.randn(4, 8, 16))
        >>> sync.step()
        >>> [health.codes for health in codebook_health(layer)]
        [4]

    Args:
        reset: whether to begin a new count.
    """
    found = []
    for bank in (module for module in model.modules() if isinstance(module, CodebookBank)):
        found += [_health(usage_K) for usage_K in bank.usage_LK]
        if reset:
            bank.usage_LK.zero_()
    return found


def _health(usage_K: Tensor) -> CodebookHealth:
    total = usage_K.sum()
    if not total:
        return CodebookHealth(len(usage_K), 0, 0.0, 0.0)
    shares_K = usage_K / total
    # xlogy, for 0 log 0 of an unused code is 0 here and not NaN.
    entropy = -torch.special.xlogy(shares_K, shares_K).sum()
    busiest = float(shares_K.max()) * len(usage_K)
    return CodebookHealth(len(usage_K), int(usage_K.ne(0).sum()), float(entropy.exp()), busiest)

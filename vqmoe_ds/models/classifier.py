"""The transformer as a classifier of texts.

Legend: B texts, S positions of the longest, D width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.config.schema import Pool, RunConfig
from vqmoe_ds.data.batches import MASKED, PADDING
from vqmoe_ds.models.linear import Linear
from vqmoe_ds.models.transformer import MoETransformer, real_tokens
from vqmoe_ds.moe.layer import MoELayer


class Classifier(MoETransformer):
    """The trunk of ``MoETransformer`` and a linear head over the pooled states; no language-model head.

    Texts are padded on the right with ``PADDING``. Attention is causal, so no real token sees it, and everything else
    works on the real tokens alone: neither logits nor auxiliary loss nor any statistic depends on the padding.

    Args:
        config: as of ``MoETransformer``; ``finetune.classes`` are the classes.
    """

    def __init__(
        self, config: RunConfig, ep_size: int = 1, ep_rank: int = 0, layer_class: type[MoELayer] = MoELayer
    ) -> None:
        super().__init__(config, ep_size, ep_rank, layer_class)
        self.head = Linear(config.model.width, len(config.finetune.classes))

    def forward(self, tokens_BS: Tensor, labels_B: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return (mean cross-entropy over texts, auxiliary loss) with labels, or (logits ``[B, C]``, auxiliary loss).

        Args:
            tokens_BS: ids, ``PADDING`` after the end of a text; no text is empty.
            labels_B: ``MASKED`` where a text does not count.
        """
        real_BS = tokens_BS.ne(PADDING)
        states_BSD, aux_loss = self.states(tokens_BS.clamp_min(0), real_BS=real_BS)
        logits_BC = self.head(self._pooled(states_BSD, real_BS)).float()
        if labels_B is None:
            return logits_BC, aux_loss
        total = F.cross_entropy(logits_BC, labels_B, ignore_index=MASKED, reduction="sum")
        return total / labels_B.ne(MASKED).sum().clamp_min(1), aux_loss

    def _pooled(self, states_BSD: Tensor, real_BS: Tensor) -> Tensor:
        lengths_B = real_BS.sum(dim=1)
        if self.config.finetune.pool is Pool.LAST:
            last_B = torch.arange(len(lengths_B), device=lengths_B.device) * real_BS.shape[1] + lengths_B - 1
            return real_tokens(states_BSD, last_B)
        sums_BD = states_BSD.float().masked_fill(~real_BS.unsqueeze(-1), 0.0).sum(dim=1)
        return (sums_BD / lengths_B.unsqueeze(1)).to(states_BSD.dtype)

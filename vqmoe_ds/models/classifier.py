"""The transformer as a classifier of texts.

Legend: B texts, S positions of the longest, D width, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.config.schema import Pool, RunConfig
from vqmoe_ds.data.batches import MASKED, PADDING
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.models.ulysses import sum_over_positions
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.linear import Linear


class Classifier(MoETransformer):
    """The trunk of ``MoETransformer`` and a linear head over the pooled states; no language-model head.

    Texts are padded on the right with ``PADDING``. Attention is causal, so no real token sees it, and everything else
    works on the real tokens alone: neither logits nor auxiliary loss nor any statistic depends on the padding.

    Ranks that share texts each hold a part of the positions, to whose number padding is added; all of them return the
    logits and losses of whole texts.

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
        if self.share is not None:  # the longest text is another in every batch
            tokens_BS = F.pad(tokens_BS, (0, -tokens_BS.shape[1] % self.share.size), value=PADDING)
            # Attention keeps it, and a recomputation reads it again: backward of a batch must come before the next
            # forward.
            self.share_sequences(self.share.of(tokens_BS.ne(PADDING)))
        real_BS = tokens_BS.ne(PADDING)
        states_BSD, aux_loss = self.states(tokens_BS.clamp_min(0), real_BS=real_BS[:, self._span])
        logits_BC = self.head(self._pooled(states_BSD, real_BS)).float()
        if labels_B is None:
            return logits_BC, aux_loss
        total = F.cross_entropy(logits_BC, labels_B, ignore_index=MASKED, reduction="sum")
        return total / labels_B.ne(MASKED).sum().clamp_min(1), aux_loss

    @property
    def _span(self) -> slice:
        """The positions that this rank holds."""
        return slice(None) if self.share is None else self.share.span

    def _pooled(self, states_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """Mean of the states of the tokens that stand for a text, ``[B, D]``: all real ones, or the last of them."""
        counted_BS = real_BS
        if self.config.finetune.pool is Pool.LAST:
            counted_BS = real_BS & ~F.pad(real_BS[:, 1:], (0, 1))
        # In float32: the sum over a long text stops growing in bfloat16.
        sums_BD = states_BSD.float().masked_fill(~counted_BS[:, self._span].unsqueeze(-1), 0.0).sum(dim=1)
        if self.share is not None:
            sums_BD = sum_over_positions(sums_BD, self.share)
        return (sums_BD / counted_BS.sum(dim=1, keepdim=True)).to(states_BSD.dtype)

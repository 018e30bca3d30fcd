"""Code sources that are known before the first block: the vectors that are compared with codes.

Legend: B batch, S sequence, D width, V vocabulary.

A source that does not drift gives codes that do not churn. Embeddings move slowly and only with their own
token; a layer's state moves with everything below it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.config.schema import CodebookConfig, CodeSource
from vqmoe_ds.moe.kernels.codes import mix_context
from vqmoe_ds.moe.mirror import HostMirror
from vqmoe_ds.moe.state import KeepsPrecision


class EmbeddingSource(KeepsPrecision):
    """Vectors made of token embeddings alone, float32 ``[B, S, D]``, without gradient.

    * ``token_embedding``: the embedding of the token.
    * ``position_embedding``: plus a sinusoidal vector of its position, ``position_weight`` times as long.
    * ``context``: ``sum_j decay^j roll(e(x_{t-j}), j)`` over the last ``context_window`` tokens. Rolling the features
      by one place per step back keeps word order (permutation binding, Kanerva 2009). It looks back only, and not past
      the start of a document.

    With ``source_momentum`` the embeddings come from a moving average of the table; at 1, from a copy of it.
    """

    table_VD: Tensor | None
    table_ready: Tensor
    positions_SD: Tensor | None

    def __init__(self, config: CodebookConfig, vocab_size: int, width: int, sequence_length: int) -> None:
        super().__init__()
        self.config = config
        table = torch.zeros(vocab_size, width, dtype=torch.float32) if config.source_momentum else None
        self.register_buffer("table_VD", table)
        # Saved, or a resumed run would copy the table anew instead of moving it.
        self.register_buffer("table_ready", torch.zeros((), dtype=torch.bool))
        self._ready = HostMirror()
        positions = _sinusoids(sequence_length, width) if config.source is CodeSource.POSITION_EMBEDDING else None
        self.register_buffer("positions_SD", positions, persistent=False)

    @property
    def looks_back(self) -> int:
        """Tokens before a token that its vector is made of."""
        return self.config.context_window - 1 if self.config.source is CodeSource.CONTEXT else 0

    @torch.no_grad()
    def forward(
        self, tokens_BS: Tensor, embedded_BSD: Tensor, start: int = 0, positions_BS: Tensor | None = None
    ) -> Tensor:
        """Vectors of tokens whose first stands at position ``start``, or of all at their positions in documents."""
        source_BSD = embedded_BSD.detach()
        if self.table_VD is not None and self._ready.read(self.table_ready):
            source_BSD = F.embedding(tokens_BS, self.table_VD)
        if self.config.source is CodeSource.CONTEXT:
            return mix_context(source_BSD, self.config.context_window, self.config.context_decay, positions_BS)
        source_BSD = source_BSD.float()
        if self.positions_SD is not None:
            unit_BSD = F.rms_norm(source_BSD, source_BSD.shape[-1:], eps=1e-6)
            places = slice(start, start + tokens_BS.shape[1]) if positions_BS is None else positions_BS
            return unit_BSD + self.config.position_weight * self.positions_SD[places]
        return source_BSD

    @property
    def follows(self) -> bool:
        """Whether the table still moves; at a momentum of 1 it does not, once it is there."""
        settled = self.config.source_momentum == 1 and self._ready.read(self.table_ready)
        return self.table_VD is not None and not settled

    @torch.no_grad()
    def follow(self, embedding_VD: Tensor) -> None:
        """Move the averaged table toward the live one; once per optimizer step, the same on all ranks."""
        if self.table_VD is None or not self.follows:
            return
        # At first the table is copied: an average that starts from zeros would stay small for long.
        momentum = self.config.source_momentum if self._ready.read(self.table_ready) else 0.0
        self.table_VD.mul_(momentum).add_(embedding_VD.float(), alpha=1 - momentum)
        self._ready.write(self.table_ready, True)


def _sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal positions of unit root mean square, ``[length, width]`` (Vaswani 2017)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length).unsqueeze(1) * rates
    # The squares of a sine and its cosine add up to 1, so the mean square is 1/2 before the factor.
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width] * math.sqrt(2)

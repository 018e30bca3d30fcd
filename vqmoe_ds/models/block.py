"""A block of the transformer: attention, then the MoE layer or a dense MLP. Plain PyTorch, no engine calls.

Legend: B batch, S sequence, T = B * S tokens, M of them real (not padding), P tokens read before, D width, A heads,
K key-value heads, N = A + 2 K heads of a projection, H width of a head, F = H / 2 angles of a position, R experts per
token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.schema import ModelConfig, QKNorm
from vqmoe_ds.models.cache import BlockCache
from vqmoe_ds.models.rotary import rotary_tables, rotate, rotate_qkv, split_heads
from vqmoe_ds.models.ulysses import from_homes, to_heads, to_homes, to_positions
from vqmoe_ds.moe.dispatch import Ahead
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.linear import Linear
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.sequence import Homes, SequenceShare


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Exports write this epsilon into their configurations: NORM_EPS of checkpoint/formats/huggingface/stock.py.
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


def attention_mask(
    like: Tensor, length: int, earlier: int = 0, window: int = 0, positions_BS: Tensor | None = None
) -> Tensor | None:
    """What is added to attention scores: 0 where a token sees another, else minus infinity. None: plainly causal.

    Args:
        like: a tensor of the type and on the device of the scores.
        length: S, tokens whose queries are computed.
        earlier: P, tokens read before them.
        window: w, a token sees itself and the w - 1 before it; 0: all before it.
        positions_BS: of the tokens in their documents, which do not see each other.

    Returns:
        ``[S, P + S]``, or ``[B, 1, S, S]`` with documents.
    """
    # Never None behind earlier tokens: PyTorch's `is_causal` puts the triangle at the top left, so that new queries
    # would see the oldest keys and not their own.
    if positions_BS is None and not earlier and not 0 < window < length:
        return None
    places_P = torch.arange(earlier + length, device=like.device)
    back = places_P[earlier:].unsqueeze(1) - places_P
    seen = back >= 0
    if window:
        seen = seen & (back < window)
    if positions_BS is not None:
        seen = seen & (back <= positions_BS[:, None, :, None])
    # Once for all blocks, and in the scores' type: of a mask of truth values PyTorch keeps such a copy for every block.
    return like.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su 2021) through PyTorch's fused kernel.

    Queries and keys may be normalised before they are turned (``model.qk_norm``): each head alone with one scale for
    all heads, or all heads together. Equally many query heads may share a key-value head (``model.kv_heads``,
    grouped-query attention, Ainslie 2023, arXiv 2305.13245). Which tokens see which is for ``attention_mask`` to say.
    """

    cos_SF: Tensor
    sin_SF: Tensor
    share: SequenceShare | None = None
    """This rank's part of sequences that others hold the rest of; not in force where tokens were read before."""
    causal = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.attention_width
        self.kv_heads, self.head_width = config.kv_heads or config.heads, inner // config.heads
        self.qkv = Linear(config.width, inner + 2 * config.kv_width)
        self.qkv_bias = nn.Parameter(torch.zeros(inner + 2 * config.kv_width)) if config.qkv_bias else None
        self.out = Linear(inner, config.width)
        self.qk_norm = config.qk_norm
        if self.qk_norm is not QKNorm.NONE:
            full = self.qk_norm is QKNorm.FULL
            self.q_norm = RMSNorm(inner if full else self.head_width)
            self.k_norm = RMSNorm(config.kv_width if full else self.head_width)
        cos_SF, sin_SF = rotary_tables(config, self.head_width)
        self.register_buffer("cos_SF", cos_SF, persistent=False)
        self.register_buffer("sin_SF", sin_SF, persistent=False)

    def forward(
        self,
        x_BSD: Tensor,
        past: BlockCache | None = None,
        homes: Homes | None = None,
        mask: Tensor | None = None,
        positions_T: Tensor | None = None,
    ) -> Tensor:
        length = x_BSD.shape[1]
        share = self.share if past is None else None
        # Queries and keys are turned before the exchange, where a rank knows the positions of its tokens.
        start = share.span.start if share is not None else 0 if past is None else past.position_of(length)
        places = slice(start, start + length) if homes is None else homes.positions_M
        qkv = self.qkv(x_BSD) if self.qkv_bias is None else self.qkv(x_BSD) + self.qkv_bias
        qkv_BSNH = qkv.unflatten(-1, (-1, self.head_width))
        if positions_T is None:
            q, k, v = self._turned(qkv_BSNH, self.cos_SF[places], self.sin_SF[places])
        else:
            q, k, v = self._turned_in_documents(qkv_BSNH, positions_T)
        if past is not None:
            k, v = past.append(k, v)
        if homes is not None:
            q, k, v = from_homes(q, k, v, homes)
        elif share is not None:
            q, k, v = to_heads(q, k, v, share)
        # PyTorch refuses a mask beside `is_causal`; the mask says both.
        y = attend(q, k, v, mask, self.causal and mask is None)
        if homes is not None:
            y = to_homes(y, homes)
        elif share is not None:
            y = to_positions(y, share)
        return self.out(y.transpose(1, 2).flatten(2))

    def _turned(self, qkv_BSNH: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, A, S, H]`` and keys, normalised as configured and turned, and values, ``[B, K, S, H]`` each."""
        if self.qk_norm is QKNorm.NONE:
            return rotate_qkv(qkv_BSNH, cos_SF, sin_SF, self.kv_heads)
        q_BSAH, k_BSKH, v_BSKH = self._normalized(qkv_BSNH)
        return *rotate(q_BSAH, k_BSKH, cos_SF, sin_SF), v_BSKH.transpose(1, 2)

    def _turned_in_documents(self, qkv_BSNH: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``_turned`` with a position of its own for every token of the batch."""
        batch, length = qkv_BSNH.shape[:2]
        # Turned as one long sequence, for the kernel takes the same angles for all sequences of a batch.
        turned = self._turned(qkv_BSNH.flatten(0, 1).unsqueeze(0), self.cos_SF[positions_T], self.sin_SF[positions_T])
        q, k, v = (x.squeeze(0).unflatten(1, (batch, length)).transpose(0, 1) for x in turned)
        return q, k, v

    def _normalized(self, qkv_BSNH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, S, A, H]`` and keys, normalised as configured, and values, ``[B, S, K, H]`` each."""
        q_BSAH, k_BSKH, v_BSKH = split_heads(qkv_BSNH, self.kv_heads)
        if self.qk_norm is QKNorm.HEADS:
            q_BSAH, k_BSKH = self.q_norm(q_BSAH), self.k_norm(k_BSKH)
        elif self.qk_norm is QKNorm.FULL:
            q_BSAH = self.q_norm(q_BSAH.flatten(2)).view_as(q_BSAH)
            k_BSKH = self.k_norm(k_BSKH.flatten(2)).view_as(k_BSKH)
        return q_BSAH, k_BSKH, v_BSKH


def attend(q_BASH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_SS: Tensor | None, causal: bool) -> Tensor:
    """PyTorch's fused attention, ``[B, A, S, H]``; query heads A / K at a time share a key-value head.

    Args:
        mask_SS: as of ``attention_mask``; None: as ``causal`` says.
    """
    if q_BASH.shape[1] == k_BKSH.shape[1]:
        return F.scaled_dot_product_attention(q_BASH, k_BKSH, v_BKSH, attn_mask=mask_SS, is_causal=causal)
    # On a GPU the kernels that take float32 or a mask know no groups, and what PyTorch does instead keeps S x S scores.
    grouped = q_BASH.is_cpu or (q_BASH.dtype is not torch.float32 and mask_SS is None)
    if not grouped:
        copies = q_BASH.shape[1] // k_BKSH.shape[1]
        k_BKSH, v_BKSH = (x.repeat_interleave(copies, dim=1) for x in (k_BKSH, v_BKSH))
    return F.scaled_dot_product_attention(
        q_BASH, k_BKSH, v_BKSH, attn_mask=mask_SS, is_causal=causal, enable_gqa=grouped
    )


class Block(nn.Module):
    """Attention and one feed-forward part, sparse or dense, each on the normalised stream."""

    def __init__(self, config: ModelConfig, feed_forward: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width), attention
        self.mlp_norm, self.mlp = RMSNorm(config.width), feed_forward

    def forward(
        self,
        x_BSD: Tensor,
        context: RoutingContext,
        ahead: Ahead,
        past: BlockCache | None = None,
        real_M: Tensor | None = None,
        homes: Homes | None = None,
        mask: Tensor | None = None,
        positions_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the stream ``[B, S, D]``, and of an MoE layer the auxiliary loss and the chosen experts ``[T, R]``."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), past, homes, mask, positions_T)
        rows = self.mlp_norm(x_BSD)
        if real_M is not None:  # padding reaches no expert: to those the real tokens are one sequence
            rows = real_tokens(rows, real_M).unsqueeze(0)
        aux_loss, experts_TR = None, None
        if isinstance(self.mlp, MoELayer):
            y, aux_loss, experts_TR = self.mlp(rows, context, ahead)
        else:
            y = self.mlp(rows)
        if real_M is not None:
            # No place twice, so the result does not depend on the order of writing.
            y = torch.zeros_like(x_BSD).flatten(0, 1).index_copy(0, real_M, y.squeeze(0)).view_as(x_BSD)
        return x_BSD + y, aux_loss, experts_TR


def real_tokens(x_BS: Tensor, real_M: Tensor | None) -> Tensor:
    """``[B, S, ...]`` -> the rows ``[M, ...]`` of the real tokens; of all T where none is padding."""
    rows = x_BS.flatten(0, 1)
    return rows if real_M is None else rows.index_select(0, real_M)

"""Attention of the VQMoE language model for Hugging Face ``transformers``: positions, and which tokens see which.

Exported folders carry this file.

Legend: B batch, S new tokens, P past tokens in the cache, D width, A heads, K key-value heads, H width of a head,
I = A * H, J = K * H, F rotary frequencies of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vqmoe import VQMoEConfig

HIDDEN = -1e4
"""What is added to the scores of tokens that are not seen, or less: whoever makes masks writes -1e4, -1e9 or -inf."""


class VQMoERMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=self.eps)


class VQMoEAttention(nn.Module):
    """Causal self-attention with rotary positions, by the implementation that ``attn_implementation`` names."""

    is_causal = True

    def __init__(self, config: VQMoEConfig, block: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_inner = config.num_key_value_heads * config.head_dim
        # transformers' attention functions read this name, `is_causal`, `config` and `layer_idx` off the module.
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.config, self.layer_idx, self.head_dim = config, block, config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_inner, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_inner, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=False)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = VQMoERMSNorm(inner if full else config.head_dim, config.rms_norm_eps)
            self.k_norm = VQMoERMSNorm(kv_inner if full else config.head_dim, config.rms_norm_eps)

    def forward(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Any, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the weights where the implementation knows them."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BSI, k_BSJ, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD).view(heads).transpose(1, 2)
        if self.config.qk_norm == "full":
            q_BSI, k_BSJ = self.q_norm(q_BSI), self.k_norm(k_BSJ)
        q_BSAH, k_BSKH = q_BSI.view(heads), k_BSJ.view(heads)
        if self.config.qk_norm == "heads":
            q_BSAH, k_BSKH = self.q_norm(q_BSAH), self.k_norm(k_BSKH)
        q, k = _rotate(q_BSAH.transpose(1, 2), rotary), _rotate(k_BSKH.transpose(1, 2), rotary)
        if past_key_values is not None:  # under autocast positions have turned keys into float32
            k, v = past_key_values.update(k.to(v.dtype), v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager_attention)
        options = {"dropout": 0.0, "scaling": self.scaling, "sliding_window": self.config.sliding_window, **kwargs}
        y_BSAH, weights = attend(self, q, k, v, mask, **options)
        return self.o_proj(y_BSAH.reshape(*x_BSD.shape[:2], -1)), weights


def _eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """``attn_implementation="eager"``: ``[B, S, A, H]`` and the weights ``[B, A, S, P + S]``."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


def _rotate(x_BASH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x_BASH.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_tables(positions_BS: Tensor, config: VQMoEConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``[B, 1, S, H / 2]``; angles in float32 whatever the model's type."""
    # In bfloat16 neighbours past position 256 would have one angle.
    halves = torch.arange(0, config.head_dim, 2, device=positions_BS.device, dtype=torch.float32)
    rates_F, size = config.rope_theta ** (-halves / config.head_dim), 1.0
    if config.rope_scaling_type != "none":
        kept_F = _kept_share(rates_F, config)
        rates_F = rates_F * (kept_F + (1 - kept_F) / config.rope_factor)
        size = 0.1 * math.log(config.rope_factor) + 1 if config.rope_scaling_type == "yarn" else 1.0
    angles = positions_BS[:, None, :, None] * rates_F
    return (angles.cos() * size).to(dtype), (angles.sin() * size).to(dtype)


def _kept_share(rates_F: Tensor, config: VQMoEConfig) -> Tensor:
    """How much of each rotary frequency stays as it was, as its scaling says; the rest is divided by the factor."""
    length = config.rope_original_length
    if config.rope_scaling_type == "linear":
        return torch.zeros_like(rates_F)
    if config.rope_scaling_type == "llama3":
        return ((length * rates_F / (2 * math.pi) - 1) / 3).clamp(0, 1)
    last, first = (
        config.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        for turns in (1, 32)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), config.head_dim - 1)
    places_F = torch.arange(len(rates_F), dtype=torch.float32, device=rates_F.device)
    # 0.001, as in transformers, where both ends of the ramp fall on one frequency.
    return 1 - ((places_F - low) / (high - low or 0.001)).clamp(0, 1)


class SeenTokens:
    """The tokens of one call, and the earlier ones that they see.

    Attributes:
        places_S: where the new tokens stand among all.
        positions_BS: of the rotary embedding.
        kept_BS: false for padding; None where nothing tells of padding.
        documents_BS: number of the packed document of each token; None where there is one.
        mask_BSP: which tokens see which, where that was given; its first column is token ``first``, before which a
            cache with a sliding window has forgotten all.

    Raises:
        ValueError: the mask has another shape than the tokens.
    """

    def __init__(
        self, x_BSD: Tensor, attention_mask: Any, position_ids: Tensor | None, past: int | Tensor, first: int = 0
    ) -> None:
        batch, length = x_BSD.shape[:2]
        self.first = first
        # A new tensor: the length of a static cache is one that its layers count up in place while blocks run.
        self.places_S = torch.arange(length, device=x_BSD.device) + past
        self.kept_BS: Tensor | None = None
        self.documents_BS: Tensor | None = None
        self.mask_BSP: Tensor | None = None
        self.unknown = False
        positions_BS = self.places_S.unsqueeze(0)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
            self.mask_BSP = _seen_pairs(attention_mask)
            self._check_pairs(batch, past)
            self.kept_BS = self._in_mask(0).expand(batch, length)
        elif isinstance(attention_mask, Tensor):
            if not torch.compiler.is_compiling() and attention_mask.shape != (batch, int(past) + length):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; it must be [batch, past + new] = "
                    f"{(batch, int(past) + length)} or [batch, 1, new, past + new]"
                )
            kept = attention_mask.to(x_BSD.device).bool()
            self.kept_BS = kept[:, -length:]
            positions_BS = (kept.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
        elif attention_mask is not None:  # of flex attention, which looks at it alone
            self.unknown = True
        elif position_ids is not None and isinstance(past, int) and past == 0:
            self.documents_BS = find_packed_sequence_indices(position_ids)
        self.positions_BS = positions_BS if position_ids is None else position_ids

    def back(self, steps: int) -> Tensor:
        """Whether each token sees the one ``steps`` before it, padding aside, ``[1 or B, S]``."""
        if self.unknown:
            raise ValueError(
                "this model's routes look back at the tokens that a token sees: give a mask that is a tensor"
            )
        there = (self.places_S >= steps).unsqueeze(0)
        if self.mask_BSP is not None and self.first > 0 and self.mask_BSP.shape[2] - self.places_S.shape[0] < steps:
            raise ValueError(
                "this model's routes look back further than its sliding window, and a mask [batch, 1, new, past + new] "
                "tells nothing of what the cache has forgotten: use a DynamicCache and a mask [batch, past + new]"
            )
        if self.mask_BSP is not None:
            return there & self._in_mask(steps)
        if self.documents_BS is not None:
            # roll wraps around, and compares the first tokens with the last: `there` hides those.
            return there & (self.documents_BS == self.documents_BS.roll(steps, dims=1))
        return there

    def before(self, known: Tensor, steps: int) -> Tensor:
        """What is known of the tokens ``steps`` before the new ones, of ``[B, P + S, D]``; see ``back``."""
        return known.index_select(1, (self.places_S - steps).clamp_min(0))

    def _check_pairs(self, batch: int, past: int | Tensor) -> None:
        assert self.mask_BSP is not None
        rows, new, ends = self.mask_BSP.shape
        length = self.places_S.shape[0]
        if torch.compiler.is_compiling() or (
            rows in (1, batch) and new == length and self.first + ends >= int(past) + length
        ):
            return
        raise ValueError(
            f"attention_mask of pairs has shape {(rows, 1, new, ends)}; it must be [batch, 1, new, past + new] = "
            f"{(batch, 1, length, int(past) + length - self.first)}"
        )

    def _in_mask(self, steps: int) -> Tensor:
        assert self.mask_BSP is not None
        places_1S1 = (self.places_S - steps - self.first).clamp_min(0).view(1, -1, 1)
        return self.mask_BSP.gather(2, places_1S1.expand(self.mask_BSP.shape[0], -1, 1)).squeeze(2)


def _seen_pairs(mask_BASP: Tensor) -> Tensor:
    """Which tokens are seen by any head of which, ``[B, S, P + S]``.

    Raises:
        ValueError: the mask is of integers, of which nobody knows whether 0 hides or adds nothing.
    """
    if mask_BASP.dtype == torch.bool:
        return mask_BASP.any(dim=1)
    if not mask_BASP.is_floating_point():
        raise ValueError(
            f"attention_mask of pairs holds {mask_BASP.dtype}: give bool (true where a token is seen), or floats that "
            "are added to scores (0 where it is)"
        )
    return (mask_BASP > HIDDEN).any(dim=1)


def sinusoids(positions_BS: Tensor, width: int) -> Tensor:
    """Sinusoidal positions of unit root mean square, ``[B, S, D]``."""
    # As `_sinusoids` of the trainer's moe/sources.py: codes were learned with these numbers.
    rates = torch.exp(torch.arange(0, width, 2, device=positions_BS.device) * (-math.log(10000.0) / width))
    angles = positions_BS.unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width] * math.sqrt(2)

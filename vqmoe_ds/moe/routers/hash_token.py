"""Experts from a table of token ids."""

from __future__ import annotations

import torch
from torch import Tensor


def hash_of_tokens(vocab_size: int, num_experts: int, num_layers: int, seed: int) -> Tensor:
    """Random balanced table of Hash Layers (Roller 2021): token id -> expert, int64 ``[L, V]``."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randperm(vocab_size, generator=generator) % num_experts for _ in range(num_layers)]
    return torch.stack(tables)

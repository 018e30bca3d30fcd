"""Small models to upcycle from, and how far a model is from the one it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)

from tests.huggingface import load_back, tokens_of
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.upcycle.dense import DenseSource, UpcycledReader, UpcycleOptions, upcycled_config

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "initializer_range": 24**-0.5,  # unit gain: with more, float32 rounding of the dense model alone passes 1e-5
}


def save_dense(folder: Path, kind: Any = LlamaConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SHAPE, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def upcycled(
    source: Path, overrides: dict[str, Any] | None = None, granularity: int = 1, noise: float = 0.0
) -> MoETransformer:
    options, dense = UpcycleOptions(granularity, noise), DenseSource(source)
    return load_back(UpcycledReader(dense, upcycled_config(dense, options, overrides or {}), options))


def distance(dense: Any, model: MoETransformer) -> float:
    tokens_BS = tokens_of(4, 32)
    with torch.no_grad():
        want = dense(tokens_BS).logits
        assert want.abs().max() > 1, "logits that say something"
        return float((model(tokens_BS)[0] - want).abs().max())


LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MULTIPLIED = {
    **{"embedding_multiplier": 1.5, "attention_multiplier": 0.3, "residual_multiplier": 0.6, "logits_scaling": 0.7},
    **{"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
}

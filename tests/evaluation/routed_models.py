"""Small models of every router, for the tests that look into them."""

from __future__ import annotations

from typing import Any

import torch

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer

IN_LAYER = {"source": "layer_state", "normalize_source": False, "num_codes": 9}
CASES: dict[str, dict[str, Any]] = {
    "vq": {"codebook": {"num_codes": 9}},
    "vq, discrete only": {"moe": {"top_k": 0}, "codebook": {"num_codes": 9}},
    "vq, the paper's input": {"moe": {"code_blend": 1.0}, "codebook": IN_LAYER},
    "vq, part of the code": {"moe": {"code_blend": 0.3, "top_k": 2}, "codebook": {**IN_LAYER, "soft_output": 20.0}},
    "vq, early block": {"codebook": {"source": "early_block", "source_block": 0, "num_codes": 6}},
    "topk": {"moe": {"top_k": 1}},
    "topk, two": {"moe": {"router": "topk", "top_k": 2}},
    "expert_bias": {"moe": {"top_k": 2}},
    "xmoe": {"moe": {"top_k": 2}},
    "stablemoe": {"moe": {"top_k": 1}},
    "smoe_dropout": {"moe": {"top_k": 1}},
    "random_frozen": {"moe": {"top_k": 2}},
    "hash_token": {},
    "hash_context": {"moe": {"top_k": 0}},
    "hash_context, dual": {"moe": {"top_k": 1}},
    "hash_and_code": {},
    "hash_ngrams": {},
    "topk_context": {"moe": {"top_k": 2}, "codebook": {"context_window": 4}},
    "topk_frozen": {"moe": {"top_k": 2}},
    "online_kmeans": {"moe": {"top_k": 2}},
    "expert_choice": {"moe": {"top_k": 2}},
    "adaptive_clustering": {"moe": {"top_k": 2}},
}
VOCAB, LENGTH, WIDTH, EXPERTS = 257, 16, 12, 4


def model_of(case: str, vocab: int = VOCAB, **moe: Any) -> MoETransformer:
    """A model in evaluation mode with weights large enough that its routers and experts are not linear."""
    sections = CASES.get(case, {})
    shape = {"vocab_size": vocab, "layers": 3, "width": WIDTH, "heads": 2, "sequence_length": LENGTH}
    told = {"router": case.split(",")[0], "num_experts": EXPERTS, "expert_hidden": 10, **sections.get("moe", {}), **moe}
    model = MoETransformer(RunConfig(**{**sections, "model": shape, "moe": told})).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "experts" in name or "gate" in name or "norm" in name:
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens_of(rows: int = 2, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))

"""The key-value cache: a text read in parts gives the logits of the whole, whatever routes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.evaluation.routed_models import CASES, LENGTH, VOCAB, model_of, tokens_of
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.cache import Cache
from vqmoe_ds.models.transformer import MoETransformer

CAUSAL = [case for case in CASES if case != "expert_choice"]
SHAPE = {"vocab_size": VOCAB, "layers": 4, "width": 24, "heads": 2, "sequence_length": LENGTH}
MORE: dict[str, dict[str, Any]] = {
    "context of five tokens": {"codebook": {"context_window": 5}},
    "averaged embeddings": {"codebook": {"source_momentum": 0.9}},
    "token embedding": {"moe": {"top_k": 0}, "codebook": {"source": "token_embedding"}},
    "position embedding": {"codebook": {"source": "position_embedding", "num_codes": 9}},
    "dense": {"moe": {"router": "dense"}},
    "every second block": {"model": {**SHAPE, "moe_every": 2}},
    "queries and keys normalised": {"model": {**SHAPE, "qk_norm": "heads"}},
    "first blocks dense": {"moe": {"top_k": 0}, "model": {**SHAPE, "dense_layers": 2}},
    "shared experts": {"moe": {"router": "topk", "top_k": 2, "shared_experts": 2}},
    "grouped queries": {"model": {**SHAPE, "heads": 4, "kv_heads": 2}},
    "all heads normalised": {"model": {**SHAPE, "qk_norm": "full", "head_width": 8}},
    "tied embeddings": {"model": {**SHAPE, "tie_embeddings": True}},
    "sliding window": {"model": {**SHAPE, "sliding_window": 5}},
}


def build(case: str) -> MoETransformer:
    """A model in evaluation mode whose state is not that of the first step."""
    if case in MORE:
        sections = {"model": SHAPE, **MORE[case]}
        sections["moe"] = {"num_experts": 4, "expert_hidden": 12, **sections.get("moe", {})}
        model = MoETransformer(RunConfig(**sections)).eval().requires_grad_(False)
    else:
        model = model_of(case)
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if name.endswith("weights_KD"):  # running statistics of adaptive_clustering
            buffer.uniform_(0.2, 3.0, generator=generator)
        elif name.endswith("table_VD"):
            buffer.normal_(generator=generator)
        elif name.endswith(("table_ready", "router.frozen")):  # and stablemoe in its second stage
            buffer.fill_(1)
        elif name.endswith("table_Vk"):
            buffer.random_(0, 4, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("case", [*CAUSAL, *MORE])
def test_a_text_in_parts_gives_the_logits_of_the_whole(case: str) -> None:
    model, tokens_BS = build(case), tokens_of(rows=3)
    whole_BSV = model(tokens_BS)[0]
    for sizes in ([1] * LENGTH, [7, 1, 1, 1, 4, 2]):
        cache = model.new_cache()
        parts = [model(part, cache=cache)[0] for part in tokens_BS.split(sizes, dim=1)]
        assert cache.length == LENGTH
        assert torch.cat(parts, dim=1).sub(whole_BSV).abs().max() < 1e-5


@torch.no_grad()
def test_a_cache_that_forgot_is_noticed_and_one_too_small_refuses() -> None:
    model, tokens_BS = build("vq"), tokens_of()
    cache = model.new_cache()
    model(tokens_BS[:, :9], cache=cache)
    known = model(tokens_BS[:, 9:], cache=cache)[0]
    fresh = model(tokens_BS[:, 9:], cache=model.new_cache())[0]
    assert (known - fresh).abs().max() > 1e-2
    with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens are more than the cache's {LENGTH}"):
        model(tokens_BS[:, :1], cache=cache)


def test_ids_looked_back_at_come_from_all_parts() -> None:
    cache, ids_BS = Cache(1, 8), torch.arange(8).unsqueeze(0)
    for part in ids_BS[:, :6].split([3, 1, 2], dim=1):
        cache.advance(part)
    assert cache.with_earlier(ids_BS[:, 6:], 4).tolist() == [[2, 3, 4, 5, 6, 7]]
    assert cache.with_earlier(ids_BS[:, 6:], 20).tolist() == [list(range(8))]
    assert cache.with_earlier(ids_BS[:, 6:], 0).tolist() == [[6, 7]]

"""Budgets: stored numbers are those of the model, FLOPs those that PyTorch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.experiments.budget import budget_of, check_group
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.runtime.errors import ConfigError

LENGTH = 16


def _config(router: str, top_k: int = 2, book: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    shape = {"vocab_size": 40, "layers": 3, "width": 24, "heads": 2, "sequence_length": LENGTH, **model}
    moe = {"router": router, "num_experts": 4, "expert_hidden": 12, "top_k": top_k}
    return RunConfig(model=shape, moe=moe, codebook=book or {})


@pytest.mark.parametrize(
    "router",
    [
        *("topk", "expert_bias", "xmoe", "stablemoe", "random_frozen", "smoe_dropout", "online_kmeans"),
        *("expert_choice", "adaptive_clustering", "hash_token"),
        *("hash_context", "topk_context", "topk_frozen"),
    ],
)
def test_a_router_costs_what_pytorch_counts(router):
    config = _config(router)
    assert _counted_routing(config) == config.moe.facts.flops(config, layer=1)


@pytest.mark.parametrize("top_k", [0, 1])
@pytest.mark.parametrize("book", [{"num_codes": 10}, {"num_codes": 10, "code_dim": 8}], ids=["plain", "projected"])
def test_codes_cost_what_pytorch_counts(top_k, book):
    config = _config("vq", top_k, {"source": "layer_state", **book})
    assert _counted_routing(config, layer=0) == config.moe.facts.flops(config, layer=0)


def _counted_routing(config: RunConfig, layer: int = 1) -> float:
    """FLOPs a token of one layer's router on one sequence."""
    model = MoETransformer(config).eval()
    tokens = torch.randint(0, 40, (1, LENGTH))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    found = counter.get_flop_counts()
    of_router = (v for k, v in found.items() if k.endswith(f"blocks.{layer}.mlp.router"))
    return sum(next(of_router, {}).values()) / LENGTH


def test_flops_of_a_whole_model_worked_out_by_hand():
    budget = budget_of(_config("topk", dense_hidden=30, moe_every=3))
    attention = 2 * 24 * 72 + 2 * 24 * 24 + 2 * 2 * 24 * (LENGTH + 1) / 2
    sparse, dense, head = 2 * 3 * 2 * 24 * 12, 3 * 2 * 24 * 30, 2 * 24 * 40
    gate = 2 * 24 * 4
    assert budget.flops == 3 * attention + sparse + 2 * dense + head + gate
    assert (budget.router_flops, budget.expert_calls) == (gate, 2)
    config = _config("hash_token")
    assert budget_of(config).stored == sum(p.numel() for p in MoETransformer(config).parameters()) + 3 * 40


def test_a_budget_beyond_the_tolerance_is_refused_and_within_it_is_not():
    budgets = {"plain": budget_of(_config("topk")), "codes": budget_of(_config("vq", 1, {"num_codes": 8}))}
    with pytest.raises(ConfigError, match=r"group 'g': entry codes has [\d,]+ stored numbers, \+\d+\.\d\d% of the"):
        check_group("g", budgets, "plain", 0.0)
    check_group("g", budgets, "plain", 0.2)
    with pytest.raises(ConfigError, match="entry calls has .* FLOPs a token"):
        check_group("g", {"plain": budgets["plain"], "calls": budget_of(_config("topk", 3))}, "plain", 0.1)

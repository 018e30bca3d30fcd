"""FLOPs of whole models (those of single routers: tests/experiments/test_budget.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vqmoe_ds.config.load import load_config
from vqmoe_ds.models.flops import Flops, forward_flops
from vqmoe_ds.models.transformer import MoETransformer


def _flops(preset: str, **changes: Any) -> Flops:
    return forward_flops(load_config(preset, None, {f"moe.{name}": value for name, value in changes.items()}).config)


def test_one_expert_call_instead_of_two_saves_what_the_paper_says_at_its_size() -> None:
    """1 - 5.6145 / 7.7620 of the table of fine-tuned models."""
    both, discrete, two = _flops("base"), _flops("base", top_k=0), _flops("base", router="topk", top_k=2)
    for before in (both, two):
        assert 1 - discrete.total / before.total == pytest.approx(1 - 5.6145 / 7.7620, abs=0.01)
    assert both.experts == two.experts == 2 * discrete.experts
    assert both.attention == discrete.attention and both.head == discrete.head
    assert both.routing > discrete.routing > 0


@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_a_sliding_window_shortens_the_context(window: int) -> None:
    changes = {"model.sequence_length": 16, "model.layers": 1}
    whole, windowed = (
        forward_flops(load_config("tiny", None, {**changes, "model.sliding_window": size}).config)
        for size in (0, window)
    )
    saved = whole.attention - windowed.attention
    pairs = sum(min(place, 16) - min(place, window, 16) for place in range(1, 17))
    assert saved == 4 * 128 * pairs // 16 and windowed.head == whole.head


@pytest.mark.parametrize("kv_heads, shared", [(0, 0), (2, 0), (0, 3)])
@pytest.mark.parametrize("router, top_k", [("vq", 0), ("vq", 1), ("topk", 2), ("softmoe", 2), ("dense", 1)])
def test_all_but_the_fused_attention_is_what_pytorch_counts(
    router: str, top_k: int, kv_heads: int, shared: int
) -> None:
    shape = {"model.layers": 3, "model.width": 32, "model.sequence_length": 16, "model.moe_every": 2}
    changes = {**shape, "moe.router": router, "moe.top_k": top_k, "codebook.num_codes": 10, "model.kv_heads": kv_heads}
    changes |= {"moe.shared_experts": shared, "moe.shared_gate": shared > 0 and router != "dense"}
    config = load_config("tiny", None, changes).config
    model, tokens_BS = MoETransformer(config).eval(), torch.randint(0, 256, (2, 16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_BS)
    fused = 3 * 2 * 32 * (16 + 1)  # queries by keys and weights by values
    # torch 2.15 counts them too, as if nothing were masked; 2.11 and 2.13 do not.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counted = counter.get_total_flops() - counter.get_flop_counts()["Global"].get(attention, 0)
    assert counted / 32 == forward_flops(config).total - fused

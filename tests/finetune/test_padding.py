"""Padding reaches nothing: logits, auxiliary losses, gradients and loads are those of the texts alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.finetune.small import CLASSES
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import PADDING
from vqmoe_ds.models.build import build_model
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer

CASES: dict[str, dict[str, Any]] = {
    "vq": {"moe.top_k": 0},
    "vq, both paths": {"moe.top_k": 1},
    "vq, layer state": {"moe.top_k": 1, "codebook.source": "layer_state"},
    "vq, early block": {"moe.top_k": 0, "codebook.source": "early_block"},
    "topk": {"moe.router": "topk", "moe.top_k": 2, "moe.z_loss_weight": 0.01},
    "expert_bias": {"moe.router": "expert_bias", "moe.top_k": 2},
    "xmoe": {"moe.router": "xmoe", "moe.top_k": 2},
    "stablemoe": {"moe.router": "stablemoe"},
    "smoe_dropout": {"moe.router": "smoe_dropout", "moe.top_k": 2},
    "random_frozen": {"moe.router": "random_frozen", "moe.top_k": 2},
    "hash_token": {"moe.router": "hash_token"},
    "hash_context": {"moe.router": "hash_context", "moe.top_k": 1},
    "hash_and_code": {"moe.router": "hash_and_code"},
    "hash_ngrams": {"moe.router": "hash_ngrams", "router.ngrams": 3},
    "topk_context": {"moe.router": "topk_context", "moe.top_k": 2},
    "topk_frozen": {"moe.router": "topk_frozen", "moe.top_k": 2},
    "expert_choice": {"moe.router": "expert_choice", "moe.top_k": 2},
    "online_kmeans": {"moe.router": "online_kmeans", "moe.top_k": 2},
    "adaptive_clustering": {"moe.router": "adaptive_clustering", "moe.top_k": 2},
    "dense": {"moe.router": "dense"},
}
LENGTHS = (9, 1, 6)


def config_of(case: str, **more: Any) -> RunConfig:
    small = {
        "model.vocab_size": 61,
        "model.layers": 3,
        "model.width": 16,
        "model.heads": 2,
        "model.sequence_length": 16,
    }
    book = {"moe.num_experts": 4, "moe.expert_hidden": 12, "codebook.num_codes": 8}
    tuned = {"finetune.classes": CLASSES, "finetune.checkpoint": "x", "finetune.trainable": "all"}
    return load_config("tiny", None, {**small, **book, **tuned, **CASES[case], **more}).config


def tokens_of(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.full((len(LENGTHS), width), PADDING)
    for row, length in zip(tokens_BS, LENGTHS, strict=True):
        row[:length] = torch.randint(0, 61, (length,), generator=generator)
    return tokens_BS


def _measure(config: RunConfig, width: int, ep_size: int = 1, ep_rank: int = 0) -> list[torch.Tensor]:
    """Logits, auxiliary loss, loads of all experts, statistics of codebook or routers, and a gradient."""
    model = build_model(config, ep_size, ep_rank, DeepSpeedMoELayer)
    for layer in model.moe_layers() if ep_size > 1 else ():
        layer.set_deepspeed_parallelism()
    logits_BC, aux = model(tokens_of(width))
    (logits_BC.square().sum() + aux).backward()
    counts = [layer.tokens_per_expert for layer in model.moe_layers()]
    pending = [] if model.bank is None else [model.bank.pending]
    pending += [layer.router.pending for layer in model.moe_layers() if hasattr(layer.router, "pending")]
    return [t.detach() for t in (logits_BC, aux, *counts, *pending, model.embed.weight.grad)]


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_depends_on_the_padding(case, pool):
    config = config_of(case, **{"finetune.pool": pool})
    tight, wide = _measure(config, 9), _measure(config, 16)
    for ours, theirs in zip(tight, wide, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    if CASES[case].get("moe.router") not in ("dense", "expert_choice"):
        rows = [int(count.sum()) for count in tight[2 : 2 + 3]]
        assert all(count % sum(LENGTHS) == 0 and count > 0 for count in rows)


@pytest.mark.parametrize("case", ["topk", "expert_choice"])
def test_a_text_has_the_logits_it_would_have_alone(case):
    model = build_model(config_of(case)).eval()
    together = model(tokens_of(12))[0]
    alone = torch.cat([model(row[row != PADDING].unsqueeze(0))[0] for row in tokens_of(12)])
    assert torch.allclose(together, alone, atol=1e-6)


def _measure_on_two(rank: int, world: int, cases: list[str]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    return [tuple(_measure(config_of(case), width, world, rank) for width in (9, 16)) for case in cases]


def test_nothing_depends_on_the_padding_with_experts_on_two_ranks():
    cases = [case for case in CASES if case != "dense"]
    whole = [_measure(config_of(case), 9) for case in cases]
    for found in run_ranks(2, _measure_on_two, cases):
        for case, one, (tight, wide) in zip(cases, whole, found, strict=True):
            for ours, theirs in zip(tight, wide, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-6), case
            assert torch.allclose(tight[0], one[0], atol=1e-6), case

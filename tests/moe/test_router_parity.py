"""Layouts do not change any registered router (``contracts.py``). All routers share a launch.

As ``tests/test_parity.py`` for vq. The default suite tries those whose state is the hardest to keep, on two layouts
that differ in everything; all routers on all layouts are slow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.moe import contracts
from tests.moe.contracts import TWO, Layout, Run, check_accumulation, check_layouts, check_resume, plain
from vqmoe_ds.config.routers import routers
from vqmoe_ds.config.schema import RunConfig

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk over all": ({"router": "topk", "top_k": 2, "z_loss_weight": 0.01}, {"softmax_over": "all"}),
    "expert_bias": ({"router": "expert_bias", "top_k": 2}, {"bias_rate": 0.02}),
    "xmoe": ({"router": "xmoe", "top_k": 1}, {}),
    "stablemoe": ({"router": "stablemoe", "top_k": 1}, {"distil_steps": 6, "low_dim": 8}),
    "smoe_dropout": ({"router": "smoe_dropout", "top_k": 1}, {"final_top_k": 4, "growth_steps": 10}),
    "random_frozen": ({"router": "random_frozen", "top_k": 2}, {}),
    "hash_token": ({"router": "hash_token"}, {}),
    "online_kmeans": ({"router": "online_kmeans", "top_k": 2}, {"decay": 0.8}),
    "expert_choice": ({"router": "expert_choice", "top_k": 2}, {}),
    "adaptive_clustering": ({"router": "adaptive_clustering", "top_k": 2}, {"decay": 0.8}),
    "adaptive_clustering of the batch": (
        {"router": "adaptive_clustering", "top_k": 1},
        {"statistics": "batch", "scaling": "global"},
    ),
    "adaptive_clustering, control": ({"router": "adaptive_clustering", "top_k": 1}, {"statistics": "none"}),
}

SEEN = {"vq", "dense", *(str(moe["router"]) for moe, _ in CASES.values())}
"""vq has a suite of its own, and a dense model no router."""
CASES |= {name: ({"router": name, "top_k": 2}, {}) for name in routers() if name not in SEEN}

HARDEST = ["stablemoe", "smoe_dropout", "expert_choice", "adaptive_clustering"]
"""A change of stages, a number of rows that grows, rows that are not per token, state handed from layer to layer."""
OTHERS = [case for case in CASES if case not in HARDEST]


def _config(case: str, **train: Any) -> RunConfig:
    return contracts.config_of(*CASES[case], **train)


def _configs(cases: list[str]) -> dict[str, RunConfig]:
    return {case: _config(case) for case in cases}


def _pairs(cases: list[str]) -> list[tuple[RunConfig, RunConfig]]:
    return [(_config(case), _config(case, activation_checkpointing=True)) for case in cases]


def test_two_layouts_that_differ_in_everything() -> None:
    check_layouts(_configs(HARDEST), TWO, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_layouts_with_the_other_routers() -> None:
    check_layouts(_configs(OTHERS), TWO, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", range(4))
def test_every_layout(stage: int) -> None:
    check_layouts(_configs(list(CASES)), [Layout(ep_size, stage) for ep_size in (1, 2, 4)], timeout=1100)


def test_one_rank_with_four_micro_batches_is_four_with_one_and_recomputation_changes_no_bit() -> None:
    check_accumulation(_pairs(["expert_bias", "smoe_dropout", "adaptive_clustering"]), 5, timeout=140)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_accumulation_and_recomputation_with_all_routers() -> None:
    check_accumulation(_pairs(list(CASES)), 8, timeout=280)


def test_resumed_runs_repeat_those_that_never_stopped_to_the_last_bit(tmp_path: Path) -> None:
    """Through the change of stages of stablemoe and in the midst of smoe_dropout's growth."""
    check_resume(_configs(["stablemoe", "adaptive_clustering", "smoe_dropout"]), tmp_path, timeout=140)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_resumed_runs(tmp_path: Path) -> None:
    check_resume(_configs(list(CASES)), tmp_path, timeout=500)


def _bf16(rank: int, world: int, configs: list[RunConfig]) -> list[Run]:
    return [contracts.engines(rank, world, [config], [Layout(2, 2, bf16=True)], 8)[0][0] for config in configs]


@pytest.mark.slow
def test_bfloat16_leaves_state_in_full_precision() -> None:
    cases = ["expert_bias", "stablemoe", "online_kmeans", "random_frozen", "adaptive_clustering"]
    configs = [_config(case) for case in cases]
    references = [plain(config, 8) for config in configs]
    for answer in run_ranks(2, _bf16, configs, timeout=120):
        for case, run, reference in zip(cases, answer, references, strict=True):
            floats = {tensor.dtype for tensor in run.state.values() if tensor.is_floating_point()}
            assert floats <= {torch.float32, torch.float64}, case
            assert run.in_step, case
            assert run.losses == pytest.approx(reference.losses, abs=0.1), case

"""What the planner counts is what real ranks hold and send."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.layouts import ALL, Layout
from tests.distributed import run_ranks
from tests.planning.measured import configure, observe
from vqmoe_ds.planning import memory, traffic
from vqmoe_ds.planning.parameters import count
from vqmoe_ds.planning.speed import members

Case = tuple[Layout, dict[str, Any]]
FLOAT32_SUMS = {"deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}
DISCRETE = {"moe.top_k": 0}
RECOMPUTED = {"train.activation_checkpointing": True}
TIED: dict[str, Any] = {"model.tie_embeddings": True, "model.sliding_window": 5}
FEW_ROUNDS = {"train.batch_size": 16}

KINDS = {
    "all_to_all_single": "all_to_all",
    "all_reduce": "all_reduce",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
}

SAMPLE: dict[int, list[Case]] = {
    1: [(Layout(0, 1, 1), {}), (Layout(2, 1, 1, "bf16"), {}), (Layout(3, 1, 1), {})],
    2: [
        (Layout(2, 2, 2), RECOMPUTED),
        (Layout(1, 1, 2, "bf16"), {}),
        (Layout(3, 2, 2, "bf16"), FEW_ROUNDS),
        (Layout(1, 1, 2, "bf16"), TIED),
        (Layout(3, 2, 2), TIED),
    ],
    4: [(Layout(2, 2, 4, "bf16"), FLOAT32_SUMS), (Layout(2, 2, 4), DISCRETE), (Layout(0, 4, 4), {})],
}


@pytest.mark.parametrize("world", SAMPLE)
def test_ranks_hold_and_send_what_was_counted(tmp_path, world):
    check(tmp_path, world, SAMPLE[world])


def test_ranks_that_share_sequences_send_what_was_counted(tmp_path):
    """The small sums of balance losses are left out, here and in the plan."""
    shared = {"train.sequence_parallel_size": 2, "model.heads": 4, **DISCRETE}
    grouped = shared | RECOMPUTED | {"model.kv_heads": 2}
    check(tmp_path, 4, [(Layout(2, 4, 4), shared), (Layout(3, 1, 4, "bf16"), grouped)])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_and_ep_size(tmp_path, world, precision):
    layouts = [Layout(x.stage, x.ep, x.world, precision) for x in ALL if x.world == world]
    check(tmp_path, world, [(layout, {}) for layout in layouts])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        FLOAT32_SUMS,
        DISCRETE,
        RECOMPUTED,
        FEW_ROUNDS,
        {"codebook.source": "layer_state", "codebook.source_momentum": 0.0},
        {"moe.router": "topk"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_option_that_changes_traffic(tmp_path, changes):
    low = "bf16" if changes is FLOAT32_SUMS else "fp32"
    check(tmp_path, 4, [(Layout(stage, 2, 4, low), changes) for stage in (1, 2, 3)])


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [{}, FEW_ROUNDS], ids=["two rounds", "four rounds"])
def test_offloaded_states_are_on_the_host(tmp_path, rounds):
    """On this machine everything is host memory; counted are the tensors that DeepSpeed puts there on purpose."""
    layouts = [Layout(stage, 1, 2, "fp32", "o") for stage in (2, 3)]
    answers = run_ranks(2, observe, str(tmp_path), [(layout, rounds) for layout in layouts])
    for number, layout in enumerate(layouts):
        config, _ = configure(tmp_path / f"planned-{number}", layout, rounds)
        weights, gradients, optimizer, host = memory.states(count(config.run), config, 0)
        held = answers[0][number]["held"]
        assert (gradients, optimizer) == (0, 0)
        assert weights == pytest.approx(held["weights"], rel=0.05)
        assert host == pytest.approx(held["host"], rel=0.05), layout


def check(folder: Path, world: int, cases: list[Case]) -> None:
    """Compare the planner with one run of each case on ``world`` ranks."""
    answers = run_ranks(world, observe, str(folder), cases, timeout=60 + 30 * len(cases))
    for number, (layout, changes) in enumerate(cases):
        config, _ = configure(folder / f"planned-{number}", layout, changes)
        parameters = count(config.run)
        for rank, answer in enumerate(answers):
            planned = memory.states(parameters, config, rank)[:3]
            for part, bytes_planned in zip(("weights", "gradients", "optimizer"), planned, strict=True):
                held = answer[number]["held"][part]
                assert bytes_planned == pytest.approx(held, rel=0.05), f"{layout} {changes} rank {rank}: {part}"
        sent = [answer[number]["sent"] for answer in answers]
        compare_traffic(traffic.transfers(parameters, config), sent, config, f"{layout} {changes}")


def compare_traffic(planned: list[traffic.Transfer], sent: list[dict[Any, int]], config: Any, what: str) -> None:
    """All-reduce and reduce-scatter to the byte on every rank; all-to-all to the byte over all ranks."""
    world, expected = len(sent), defaultdict(int)
    for transfer in planned:
        group = members(config, transfer.over)
        expected[transfer.kind, len(group), group[1] - group[0]] += transfer.payload
    measured: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for answer in sent:
        for (name, size, stride), payload in answer.items():
            measured[KINDS[name], size, stride].append(payload)
    for key in {key for key in (*expected, *measured) if key[0] != "all_gather"}:
        if key[0] == "all_to_all":
            assert sum(measured[key]) == world * expected[key], f"{what}: {key}"
        else:
            assert measured[key] == [expected[key]] * world, f"{what}: {key}"
    if config.zero_stage < 3:
        gathers = {key: value for key, value in expected.items() if key[0] == "all_gather"}
        for key, payload in gathers.items():
            assert measured[key] == [payload] * world, f"{what}: {key}"

"""The figures of the health line, on two real ranks: bytes to the byte, and who is slow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.layouts import Layout
from tests.distributed import run_ranks
from tests.planning.measured import build, close, configure
from vqmoe_ds.planning import traffic
from vqmoe_ds.planning.parameters import count
from vqmoe_ds.train.health import CommunicationMeter, health_line

LAYOUT = Layout(2, 2, 2)
HASHED = {"moe.router": "hash_token"}  # which rows cross follows from the tokens and a table
CASES = [HASHED, {**HASHED, "train.activation_checkpointing": True}]
STEPS, PAUSE = 2, 0.4


def train_measured(rank: int, world: int, folder: str) -> dict[str, Any]:
    """The figures of two steps of each case, and of steps in which one rank and then the other pauses."""
    exact = [_bytes_of(rank, world, f"{folder}/{number}", case) for number, case in enumerate(CASES)]
    trainer = build(rank, world, f"{folder}/slow", LAYOUT, HASHED)
    meter = CommunicationMeter(trainer.session.place, trainer.session.device)
    _train(trainer, meter)
    forward, slow = trainer.session.engine.module.forward, []
    for slow_rank in (1, 0, None):
        _slow_down(trainer.session.engine.module, forward, PAUSE if rank == slow_rank else 0.0)
        slow.append(_train(trainer, meter))
    return {"exact": exact, "slow": slow}


def _slow_down(module: Any, forward: Any, seconds: float) -> None:
    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return forward(*args, **kwargs)

    module.forward = slowly


def _bytes_of(rank: int, world: int, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What the meter says, and the rows of this rank's tokens whose experts are on the other one, a step."""
    trainer = build(rank, world, folder, LAYOUT, changes)
    meter = CommunicationMeter(trainer.session.place, trainer.session.device)
    table_LV, crossing = trainer.session.model.token_table_LV, 0
    local = trainer.session.model.moe_layers()[0].num_local_experts
    read = trainer.batches.micro_batches

    def reading(*args: Any) -> Any:
        nonlocal crossing
        batches = read(*args)
        crossing += sum(int((table_LV[:, batch.inputs_BS.flatten()] // local != rank).sum()) for batch in batches)
        return batches

    trainer.batches.micro_batches = reading
    figures = _train(trainer, meter)
    close(trainer)
    return {**figures, "crossing": crossing / STEPS}


def _train(trainer: Any, meter: CommunicationMeter) -> dict[str, Any]:
    meter.counting = True
    seconds = sum(trainer.train_step().seconds for _ in range(STEPS))
    meter.counting = False
    return meter.measure(seconds, STEPS)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("health")
    return folder, run_ranks(2, train_measured, str(folder))


@pytest.mark.parametrize("number", range(len(CASES)), ids=["plain", "recomputed"])
def test_all_to_all_bytes_are_exact(answers, number):
    """What the plan sends, less the rows that stay with their rank."""
    folder, ranks = answers
    config, _ = configure(folder / f"planned-{number}", LAYOUT, CASES[number])
    sent = {t.purpose: t.payload for t in traffic.transfers(count(config.run), config)}
    routed = config.run.train.batch_size * config.run.model.sequence_length * config.run.model.layers
    crossing = sum(rank["exact"][number]["crossing"] for rank in ranks)
    assert 0 < crossing < routed
    expected = 2 * sent["expert rows"] * crossing / routed + 2 * sent["row counts"] / 2  # half of the counts stay
    for rank in ranks:
        assert rank["exact"][number]["all_to_all_bytes"] == expected
        assert rank["exact"][number]["all_to_all_seconds"] > 0


def test_the_slow_rank_is_named(answers):
    """A rank that pauses in every forward pass works longer, though all steps last equally long."""
    _, ranks = answers
    for first, second in zip(*(rank["slow"] for rank in ranks), strict=True):
        assert first == second, "the figures are the same on all ranks"
    of_one, of_zero, even = ranks[0]["slow"]
    assert (of_one["slowest_rank"], of_zero["slowest_rank"]) == (1, 0)
    # Two ranks of which one works w and the other w + pause: (w + pause) / (w + pause / 2) - 1.
    for slow in (of_one, of_zero):
        assert 0.3 < slow["step_time_spread"] <= 1
        assert slow["step_time_spread"] > even["step_time_spread"]
    assert f"slowest rank 1 (worked +{of_one['step_time_spread']:.1%}" in health_line(of_one)


def test_the_line_names_the_busiest_expert_of_any_layer():
    row = {"slowest_rank": 3, "step_time_spread": 0.25, "all_to_all_bytes": 2_500_000, "all_to_all_seconds": 0.0123}
    line = health_line({**row, "busiest_expert": [1.5, 4.0, 2.0]})
    assert "slowest rank 3 (worked +25.0%" in line
    assert "busiest expert 4.00 x the mean | all-to-all 2.50 MB, 12.3 ms a step" in line

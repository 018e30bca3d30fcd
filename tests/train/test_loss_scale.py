"""float16: DeepSpeed's own engines and scalers, on the CPU, which it refuses only because they are slow there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch

from tests.distributed import run_ranks
from tests.train.test_loop import SMALL
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.raw_text import TrainingBatches, split_corpus


def _trainer(rank: int, world: int, folder: str, values: dict[str, Any]) -> Any:
    from deepspeed.accelerator import get_accelerator

    from vqmoe_ds.runtime.ranks import Place
    from vqmoe_ds.train import engine
    from vqmoe_ds.train.loop import Trainer

    path = Path(folder) / f"rank{rank}.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, **values}))
    config = resolve(str(path), load_config("tiny", None, {**SMALL, "data.path": f"{folder}/text.txt"}), world, world)
    get_accelerator().is_fp16_supported = lambda: True  # for good: this rank is a process of its own
    with patch.object(engine, "uses_gpu", lambda: True):
        session = engine.build_session(config, Place(rank, world, rank, world), str(path))
    train, _ = split_corpus(open_corpus(config.run.data.path), 16, 10)
    return Trainer(session, TrainingBatches(train, 8, 0), [])


def _scale(engine: Any) -> float:
    holder = getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler
    return float(holder.cur_scale)


def _train(
    rank: int, world: int, folder: str, stage: int, fp16: dict[str, Any], steps: int, fused: bool = False
) -> list[dict[str, Any]]:
    from vqmoe_ds.train.engine import searches_loss_scale

    if fused:  # torch's Adam in place of DeepSpeed's own, which needs a GPU, and which it wraps otherwise at stage 0
        deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW
    trainer = _trainer(rank, world, folder, {"zero_optimization": {"stage": stage}, "fp16": {"enabled": True, **fp16}})
    engine, rows = trainer.session.engine, []
    for _ in range(steps):
        before, result = _scale(engine), trainer.train_step()
        norm = float(engine.get_global_grad_norm())
        row = {"taken": bool(result.taken), "searching": searches_loss_scale(engine), "loss": result.loss, "norm": norm}
        counted = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
        rows.append({**row, "before": before, "after": _scale(engine), "counted": counted})
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 122)) * 200)
    return str(tmp_path)


def _in_fp32(rank: int, world: int, folder: str) -> list[tuple[float, float]]:
    trainer = _trainer(rank, world, folder, {"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0})
    return [(trainer.train_step().loss, float(trainer.session.engine.get_global_grad_norm())) for _ in range(3)]


@pytest.mark.parametrize(("stage", "fused"), [(0, False), (0, True), (1, False), (2, False), (3, False)])
def test_the_scale_falls_until_gradients_fit_and_training_then_goes_as_in_fp32(folder, stage, fused):
    first = run_ranks(2, _train, folder, stage, {"initial_scale_power": 24, "hysteresis": 1}, 10, fused)
    for rows in first:
        skipped = [row for row in rows if not row["taken"]]
        assert 4 <= len(skipped) < 10, "the search is longer than train.max_bad_steps"
        for row in rows:
            assert row["after"] == (row["before"] if row["taken"] else row["before"] / 2)
        assert all(row["searching"] for row in skipped)
        assert rows[-1]["taken"]
    scaled = run_ranks(2, _train, folder, stage, {"initial_scale_power": 10}, 3, fused)[0]
    assert stage or [row["counted"] for row in scaled] == [{1.0}, {2.0}, {3.0}], "no empty step before"
    plain = run_ranks(2, _in_fp32, folder)[0]
    assert [row["loss"] for row in scaled] == pytest.approx([loss for loss, _ in plain], abs=2e-3)
    assert [row["norm"] for row in scaled] == pytest.approx([norm for _, norm in plain], rel=0.02)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_scale_that_cannot_fall_any_more_is_a_bad_step_and_no_exception(folder, stage):
    floor = {"initial_scale_power": 24, "min_loss_scale": 2**23, "hysteresis": 1}
    rows = run_ranks(2, _train, folder, stage, floor, 4)[0]
    assert not any(row["taken"] for row in rows)
    assert [row["searching"] for row in rows] == [False] * 4
    assert rows[-1]["after"] == 2**23


@pytest.mark.parametrize("stage", [0, 2])
def test_a_fixed_scale_searches_nothing(folder, stage):
    rows = run_ranks(2, _train, folder, stage, {"loss_scale": 2.0**24}, 2)[0]
    assert not any(row["taken"] or row["searching"] for row in rows)

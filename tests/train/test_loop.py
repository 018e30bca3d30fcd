"""Bad steps are skipped and counted, on every ZeRO stage, and training gives up with a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import TrainConfig
from vqmoe_ds.data.batches import TrainingBatches
from vqmoe_ds.data.corpus import open_corpus, split_corpus
from vqmoe_ds.errors import TrainingHalted
from vqmoe_ds.train.schedule import learning_rate

SMALL = {
    **{"model.layers": 1, "model.width": 16, "model.heads": 2, "model.sequence_length": 16},
    **{"moe.num_experts": 4, "moe.expert_hidden": 16, "moe.top_k": 1, "codebook.num_codes": 4},
    **{"train.batch_size": 8, "train.steps": 20, "train.max_bad_steps": 2},
}


def _train_with_poison(rank: int, world: int, folder: str, stage: int, bf16: bool) -> dict[str, Any]:
    """Poison the loss of rank 1 at steps 2, and of all at 4 and 5; report what moved."""
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer
    from vqmoe_ds.train.ranks import Place

    json_path = f"{folder}/zero{stage}.json"
    loaded = load_config("tiny", None, {**SMALL, "data.path": f"{folder}/text.txt"})
    config = resolve(json_path, loaded, world)
    session = build_session(config, Place(rank, world, rank, world), json_path)
    train, _ = split_corpus(open_corpus(config.run.data.path), 16, 10)
    trainer = Trainer(session, TrainingBatches(train, 8, 0), [])
    poison = {"on": False}
    session.model.head.register_forward_hook(lambda m, i, out: out * float("nan") if poison["on"] else None)
    report: dict[str, Any] = {"taken": [], "moved": [], "codes_moved": []}
    for step in range(6):
        poison["on"] = step in (4, 5) or (step == 2 and rank == world - 1)
        weights, codes = _weights(session), session.model.bank.codes_LKC.clone()
        result = trainer.train_step()
        report["taken"].append(result.taken)
        report["moved"].append(not torch.equal(weights, _weights(session)))
        report["codes_moved"].append(not torch.equal(codes, session.model.bank.codes_LKC))
        report["finite"] = bool(torch.isfinite(_weights(session)).all())
    report["bad_steps"] = trainer.bad_steps
    trainer.last_checkpoint = "runs/x/global_step4"
    try:
        trainer._give_up_if_hopeless()
    except TrainingHalted as error:
        report["sentence"] = str(error)
    return report


def _weights(session: Any) -> torch.Tensor:
    import deepspeed

    params = list(session.model.parameters())
    with deepspeed.zero.GatheredParameters(params):
        return torch.cat([p.detach().float().flatten().clone() for p in params])


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (0, True), (2, False), (2, True), (3, False)])
def test_a_nan_on_one_rank_skips_the_step_on_all_and_two_in_a_row_end_training(tmp_path, stage, bf16):
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 122)) * 200)
    values = {"zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    (tmp_path / f"zero{stage}.json").write_text(json.dumps({**values, "bf16": {"enabled": bf16}}))
    for report in run_ranks(2, _train_with_poison, str(tmp_path), stage, bf16):
        assert report["taken"] == [True, True, False, True, False, False]
        assert report["moved"] == report["taken"]
        assert report["codes_moved"] == report["taken"]
        assert report["finite"]
        assert report["bad_steps"] == 3
        assert "2 steps in a row up to step 6" in report["sentence"]
        assert "runs/x/global_step4" in report["sentence"]


def test_schedule_warms_up_and_falls_to_its_floor():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))

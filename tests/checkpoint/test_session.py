"""Saving and resuming on real ranks: every ZeRO stage, experts shared out, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config

SMALL = {
    **{"model.layers": 2, "model.width": 16, "model.heads": 2, "model.sequence_length": 16},
    **{"moe.num_experts": 4, "moe.expert_hidden": 16, "moe.top_k": 1, "codebook.num_codes": 8},
    **{"codebook.source_momentum": 0.9, "train.batch_size": 8, "train.steps": 20},
}
VARIANTS = [
    {"zero_optimization": {"stage": 0}},
    {"zero_optimization": {"stage": 1}},
    {"zero_optimization": {"stage": 2}},
    {"zero_optimization": {"stage": 3}},
    {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
]


def _session(rank: int, world: int, folder: str, variant: dict[str, Any], ep_size: int) -> Any:
    from vqmoe_ds.data.corpus import open_corpus
    from vqmoe_ds.data.raw_text import TrainingBatches, split_corpus
    from vqmoe_ds.runtime.ranks import Place
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer

    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    values = {**variant, "optimizer": optimizer, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 2}
    path = Path(folder) / f"rank{rank}.json"
    path.write_text(json.dumps(values))
    loaded = load_config("tiny", None, {**SMALL, "data.path": f"{folder}/text.txt"})
    config = resolve(str(path), loaded, world, ep_size)
    session = build_session(config, Place(rank, world, rank, world), str(path))
    train, _ = split_corpus(open_corpus(config.run.data.path), 16, 10)
    return Trainer(session, TrainingBatches(train, 8, 0), [])


def _resume(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    from tests.checkpoint.layouts import save
    from vqmoe_ds.checkpoint.resume.session import choose, load

    reports = []
    for number, variant in enumerate(VARIANTS):
        checkpoints = Path(folder) / f"checkpoints{number}"
        through = _session(rank, world, folder, variant, ep_size=2)
        for _ in range(3):
            through.train_step()
        save(through.session, checkpoints, through.step, keep_last=1)
        losses = [through.train_step().loss for _ in range(3)]
        again = _session(rank, world, folder, variant, ep_size=2)
        tag, passed_over = choose(checkpoints, "auto", rank)
        again.step = load(again.session, tag)
        resumed = [again.train_step().loss for _ in range(3)]
        codes = torch.equal(again.session.model.bank.codes_LKC, through.session.model.bank.codes_LKC)
        table = torch.equal(again.session.model.source.table_VD, through.session.model.source.table_VD)
        reports.append({"losses": losses, "resumed": resumed, "codes": codes and table, "passed_over": passed_over})
    return reports


def _other_layouts(rank: int, world: int, folder: str) -> list[list[float]]:
    from vqmoe_ds.checkpoint.resume.session import load

    losses = []
    for variant, ep_size in ((VARIANTS[2], 1), (VARIANTS[3], 2), (VARIANTS[0], 2)):
        trainer = _session(rank, world, folder, variant, ep_size)
        trainer.step = load(trainer.session, Path(folder) / "checkpoints2/global_step0000003")
        losses.append([trainer.train_step().loss for _ in range(3)])
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("session")
    (path / "text.txt").write_bytes(bytes(range(32, 122)) * 100)
    return path


@pytest.fixture(scope="module")
def reports(folder):
    return run_ranks(2, _resume, str(folder), timeout=200)


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=[json.dumps(v) for v in VARIANTS])
def test_a_resumed_run_repeats_the_losses_of_one_that_never_stopped(reports, number):
    for rank_reports in reports:
        report = rank_reports[number]
        assert report["resumed"] == report["losses"]
        assert report["codes"]
        assert report["passed_over"] == []


def test_another_layout_goes_on_with_the_same_losses(reports, folder):
    for losses in run_ranks(2, _other_layouts, str(folder), timeout=100)[0]:
        assert losses == pytest.approx(reports[0][2]["losses"], abs=1e-5)

"""Resuming on other ranks, mid-epoch: every sample once, the same losses, the same codes; the rest is refused."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import RankFailure, run_ranks
from tests.prepared import write_sequences
from vqmoe_ds.checkpoint.io.store import read_manifest, write_manifest
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.batches import Batch
from vqmoe_ds.runtime.errors import CheckpointError

SMALL = {
    **{"model.layers": 2, "model.width": 16, "model.heads": 2, "model.sequence_length": 16, "model.vocab_size": 4096},
    **{"moe.num_experts": 4, "moe.expert_hidden": 16, "moe.top_k": 1, "codebook.num_codes": 8},
    **{"codebook.code_map": "balanced", "codebook.dead_below": 0.3, "codebook.source_momentum": 0.9},
    **{"train.batch_size": 8, "train.steps": 40, "train.warmup_steps": 2},
}
SAVED, LAST = 11, 33  # optimizer steps; an epoch ends between them


class Recorded:
    """Notes the first token, which tells them apart, of every window that is read for training."""

    masked = True

    def __init__(self, batches: Any, log: Path) -> None:
        self.batches, self.log = batches, log

    def micro_batches(self, first: int, rank: int, world: int, size: int) -> list[Batch]:
        read = self.batches.micro_batches(first, rank, world, size)
        with open(self.log, "a") as file:
            starts = [int(start) for batch in read for start in batch.inputs_BS[:, 0]]
            file.write(json.dumps([first, starts]) + "\n")
        return read

    def epoch(self, samples: int) -> float:
        return self.batches.epoch(samples)


def _config(folder: Path, rank: int, world: int, micro: int, stage: int, **changes: Any) -> EngineConfig:
    ep_size, precision = changes.pop("ep_size", 1), changes.pop("precision", "fp32")
    values: dict[str, Any] = {
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": micro,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
    }
    path = folder / f"rank{rank}.json"
    path.write_text(json.dumps(values))
    loaded = load_config("tiny", None, {**SMALL, "data.path": str(folder / "numbers"), **changes})
    return resolve(str(path), loaded, world, ep_size)


def _trainer(folder: Path, rank: int, config: EngineConfig, log: str) -> Any:
    from vqmoe_ds.data.indexed import open_indexed_text
    from vqmoe_ds.runtime.ranks import Place
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer

    world = config.world_size
    session = build_session(config, Place(rank, world, rank, world), "test.json")
    data = open_indexed_text(config.run)
    batches, _ = data.open(config.run, folder / "cache")
    return Trainer(session, Recorded(batches, folder / f"{log}-{rank}.jsonl"), [])


def _state(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights and everything a codebook holds."""
    return {name: value.clone() for name, value in trainer.session.model.state_dict().items()}


def _train_to(trainer: Any, last: int) -> list[float]:
    return [trainer.train_step().loss for _ in range(last - trainer.step)]


def _uninterrupted(rank: int, world: int, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = _trainer(folder, rank, _config(folder, rank, world, 2, 0), "whole")
    return _train_to(trainer, LAST), _state(trainer)


def _killed(rank: int, world: int, folder: Path) -> None:
    from tests.checkpoint.layouts import save

    trainer = _trainer(folder, rank, _config(folder, rank, world, 2, 0), "killed")
    _train_to(trainer, SAVED)
    save(trainer.session, folder / "checkpoints", trainer.step, keep_last=1)
    if rank == 0:
        torch.save(_state(trainer), folder / "saved.pt")
    _train_to(trainer, SAVED + 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _resumed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    from vqmoe_ds.checkpoint.resume.session import choose, load

    trainer = _trainer(folder, rank, _config(folder, rank, world, 2, 0), f"resumed{world}")
    tag, _ = choose(folder / "checkpoints", "auto", rank)
    trainer.step = load(trainer.session, tag)
    restored = _state(trainer)
    saved = torch.load(folder / "saved.pt")
    losses = _train_to(trainer, LAST)
    same = [name for name in saved if torch.equal(saved[name], restored[name])]
    return {"losses": losses, "same": len(same) == len(saved), "state": _state(trainer)}


@pytest.fixture(scope="module")
def uninterrupted(folder) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and last state of a run on four ranks that nothing disturbed."""
    return run_ranks(4, _uninterrupted, folder)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    sizes = np.random.default_rng(0).integers(10, 90, 80)
    ends = np.cumsum(sizes)
    write_sequences(path / "numbers", [range(end - size, end) for end, size in zip(ends, sizes, strict=True)])
    assert ends[-1] < 4096
    return path


def _consumed(folder: Path, log: str, steps: range) -> Counter[int]:
    lines = [json.loads(line) for path in folder.glob(f"{log}-*.jsonl") for line in path.read_text().splitlines()]
    return Counter(start for first, starts in lines if first // 8 in steps for start in starts)


def test_killed_on_four_ranks_it_goes_on_on_two_and_on_one_without_a_sample_lost_or_repeated(folder, uninterrupted):
    losses, state = uninterrupted
    with pytest.raises(RankFailure, match="died without an answer"):
        run_ranks(4, _killed, folder)
    windows = (int(np.memmap(folder / "numbers.bin", np.uint16).searchsorted(_held_out(folder))) - 1) // 16
    epoch = windows // 8  # whole steps of the first epoch
    assert SAVED < epoch < LAST
    for world in (2, 1):
        for report in run_ranks(world, _resumed, folder):
            assert report["same"], "weights, codes, tables and counts come back bit for bit"
            assert report["losses"] == pytest.approx(losses[SAVED:], abs=1e-5)
            assert report["state"].keys() == state.keys()
            for name, value in report["state"].items():
                assert torch.allclose(value.double(), state[name].double(), atol=1e-4), name
        seen = _consumed(folder, "killed", range(SAVED)) + _consumed(folder, f"resumed{world}", range(SAVED, LAST))
        assert seen == _consumed(folder, "whole", range(LAST))
        first = _consumed(folder, "killed", range(SAVED)) + _consumed(folder, f"resumed{world}", range(SAVED, epoch))
        assert len(first) == epoch * 8, "a sample of the epoch came twice"
        assert windows - len(first) < 8, "a sample of the epoch is missing"


def _held_out(folder: Path) -> int:
    """The first number that is held out."""
    from vqmoe_ds.data.index_files import check_prefix

    return int(check_prefix(str(folder / "numbers")).lengths[:72].sum())


# ----------------------------------------------------- micro-batches and accumulation

ALIKE = {"moe.balance_weight": 0.0, "codebook.dead_below": 0.0}
"""Balancing is by micro-batch, and re-seeding draws from one: both change with their size."""


def _other_micro_batches(rank: int, world: int, folder: Path) -> list[tuple[list[float], list[float]]]:
    from tests.checkpoint.layouts import save
    from vqmoe_ds.checkpoint.resume.session import load

    answers = []
    for stage in range(4):
        checkpoints = folder / f"micro{stage}"
        through = _trainer(folder, rank, _config(folder, rank, world, 4, stage, **ALIKE), "micro")
        _train_to(through, 3)
        tag = save(through.session, checkpoints, through.step, keep_last=1)
        expected = _train_to(through, 6)
        again = _trainer(folder, rank, _config(folder, rank, world, 1, stage, **ALIKE), "micro")
        again.step = load(again.session, tag)
        answers.append((expected, _train_to(again, 6)))
    return answers


def test_micro_batch_and_accumulation_may_change_on_every_stage(folder):
    for answers in run_ranks(2, _other_micro_batches, folder, timeout=200):
        for expected, resumed in answers:
            assert resumed == pytest.approx(expected, abs=1e-5)


def _other_batch(rank: int, world: int, folder: Path) -> None:
    from tests.checkpoint.layouts import save
    from vqmoe_ds.checkpoint.resume.session import consumed_samples, load

    first = _trainer(folder, rank, _config(folder, rank, world, 2, 0), "batches")
    _train_to(first, 3)
    tag = save(first.session, folder / "batches", first.step, keep_last=1, samples=first.samples)
    then = _trainer(folder, rank, _config(folder, rank, world, 2, 0, **{"train.batch_size": 4}), "batches")
    then.step = load(then.session, tag)
    then.resumed_at = (then.step, consumed_samples(tag))
    _train_to(then, 7)
    assert then.samples == 3 * 8 + 4 * 4


def test_no_sample_is_lost_or_repeated_where_the_global_batch_changes(folder, uninterrupted):
    run_ranks(2, _other_batch, folder)
    first, then = (_consumed(folder, name, range(5)) for name in ("batches", "whole"))
    assert sum(first.values()) == 40 and first == then


# ------------------------------------------------------------------------- refusals


def _save_one(rank: int, world: int, folder: Path) -> None:
    from tests.checkpoint.layouts import save

    config = _config(folder, rank, world, 2, 0, **{"data.tokenizer_sha256": "abc" * 10})
    save(_trainer(folder, rank, config, "refused").session, folder / "plain", 0, keep_last=1)


def test_what_cannot_be_resumed_is_refused_by_name(folder):
    from vqmoe_ds.checkpoint.resume.session import check_fits

    run_ranks(2, _save_one, folder)
    tag, same = folder / "plain/global_step0000000", {"data.tokenizer_sha256": "abc" * 10}
    cases = [
        (2, {}, "trained on ids of the tokenizer abcabcabcabc, this run's data is made of raw bytes"),
        (2, {"data.tokenizer_sha256": "unknown"}, "made of ids of an unknown tokenizer"),
        (2, {"data.tokenizer_sha256": "d" * 64}, "made of ids of the tokenizer dddddddddddd"),
        (2, {"precision": "fp16", **same}, "written with precision=fp32, this run has precision=fp16"),
    ]
    for world, more, sentence in cases:
        with pytest.raises(CheckpointError, match=sentence):
            check_fits(_config(folder, 0, world, 2, 0, **more), tag)
    for world, stage in ((1, 0), (4, 3)):
        check_fits(_config(folder, 0, world, 2, stage, **same), tag)
    config, fp16 = (_config(folder, 0, 2, 2, 0, precision=precision, **same) for precision in ("fp32", "fp16"))
    for number, layout in enumerate(({}, fp16.layout())):  # as of a Hugging Face folder, and of a run in fp16
        portable = folder / f"portable-{number}"
        portable.mkdir()
        write_manifest(portable, {"step": 0, "layout": layout, "config": read_manifest(tag)["config"]}, {})
        check_fits(config, portable)
        with pytest.raises(CheckpointError, match="written by a tool, not by a run, and fp16 resumes from checkpoints"):
            check_fits(fp16, portable)

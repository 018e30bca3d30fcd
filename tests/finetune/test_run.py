"""One command of several runs on several ranks, which may see other states of a file system."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.distributed import run_ranks
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.finetune import run
from vqmoe_ds.runtime.ranks import Place
from vqmoe_ds.train.job import Job
from vqmoe_ds.train.run_folder import in_folder

JSON = str(Path(__file__).resolve().parents[2] / "ds_configs/zero2.json")


class _Seeds(run.FineTuning):
    """Two seeds, of which each rank sees its own as finished."""

    def __init__(self, rank: int, config: EngineConfig) -> None:
        super().__init__(argparse.Namespace())
        self.configs = {"seed-0": config, "seed-1": config}
        self.reader: Any = SimpleNamespace(path=Path(f"global_step{rank}"))
        self.began: list[tuple[str, Path]] = []

    def _run_one(self, job: Job) -> int:
        self.began.append((job.run_dir.name, self.reader.path))
        return 0


def _run_seeds(rank: int, world: int, folder: Path) -> list[tuple[str, Path]]:
    config = in_folder(resolve(JSON, load_config(), world), folder)
    command = _Seeds(rank, config)
    with (
        mock.patch.object(run, "is_finished", lambda place: place.name == f"seed-{rank}"),
        mock.patch("vqmoe_ds.checkpoint.open.open_checkpoint", lambda path: SimpleNamespace(path=path, config={})),
        mock.patch("vqmoe_ds.finetune.report.write_report", lambda *_: []),
    ):
        command.run(Job(config, Place(rank, world, rank, world), mock.Mock(), JSON, "auto", False, 0.0))
    return command.began


def test_all_ranks_run_what_rank_0_sees_unfinished_from_the_tag_that_it_opened(tmp_path: Path) -> None:
    assert run_ranks(2, _run_seeds, tmp_path) == [[("seed-1", Path("global_step0"))]] * 2

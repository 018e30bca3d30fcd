"""DeepSpeed's own ``ds_to_universal``: what it makes of our checkpoints goes into an engine of another layout."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests import warm
from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks
from vqmoe_ds.checkpoint.open import open_checkpoint


class Universal(Layout):
    def deepspeed(self):
        return {**super().deepspeed(), "checkpoint": {"load_universal": True}}


def _save(rank: int, world: int, folder: str) -> None:
    training = Training(folder, Layout(2, 2, 2), rank)
    training.train(2)
    training.save(Path(folder) / "checkpoints")


def _load(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    training = Training(folder, Universal(2, 1, 1), rank)
    training.session.engine.load_checkpoint(folder, tag="universal", load_lr_scheduler_states=False)
    return {name: param.detach().clone() for name, param in training.session.model.named_parameters()}


def test_universal_checkpoints_of_deepspeed_load_into_an_engine(tmp_path: Path) -> None:
    run_ranks(2, _save, str(tmp_path))
    tag = tmp_path / "checkpoints/global_step0000002"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(tag)]
    done = warm.run([*command, "--output_folder", str(tmp_path / "universal")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [weights] = run_ranks(1, _load, str(tmp_path))
    reader = open_checkpoint(tag)
    for name in reader.names():
        assert torch.equal(weights[name], reader.tensor(name)), name

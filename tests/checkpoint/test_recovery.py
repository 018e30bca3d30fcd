"""The script in a checkpoint folder: what stands there works, experts of several ranks included."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests import warm
from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks
from vqmoe_ds.checkpoint.open import open_checkpoint


def _save(rank: int, world: int, folder: str) -> None:
    training = Training(folder, Layout(2, 2, 2), rank)
    training.train(1)
    training.save(Path(folder) / "checkpoints")


def test_the_script_in_the_folder_writes_the_weights_of_all_ranks(tmp_path: Path) -> None:
    run_ranks(2, _save, str(tmp_path))
    command = [sys.executable, "zero_to_fp32.py", ".", str(tmp_path / "out"), "--tag", "global_step0000001"]
    done = warm.run(command, cwd=tmp_path / "checkpoints", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "checkpoints/zero_to_torch.py").exists()
    tag, out = open_checkpoint(tmp_path / "checkpoints/global_step0000001"), open_checkpoint(tmp_path / "out")
    names = tag.names()
    assert any("experts" in name for name in names)
    for name in names:
        assert torch.equal(tag.tensor(name), out.tensor(name)), name

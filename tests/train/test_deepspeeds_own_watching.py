"""DeepSpeed's own monitors, profiler and timers, by the keys of its JSON: they write what they write elsewhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from tests import warm
from tests.launchers.test_pretrain import LAUNCHER, _free_port, environment, losses, small  # noqa: F401


def _two_ranks(small: list[str], run_dir: Path, **values: Any) -> list[str]:  # noqa: F811
    """Train on two ranks; returns what each wrote to its log."""
    path = run_dir.with_suffix(".json")
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, **values}))
    words = [*small[2:], "--ds_config", str(path), "--run_dir", str(run_dir), "--train_steps", "6", "--ep_size", "2"]
    env = {**environment(), "PYTHONFAULTHANDLER": "1"}
    # Forked late from a process that had run much of the suite, rank 0 of the second run was killed by SIGBUS.
    ranks = warm.start_ranks(2, [*LAUNCHER, *words], _free_port(), env, cold=True, stdout=-1, stderr=-1, text=True)
    answers = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    return [(run_dir / f"logs/rank{rank}.log").read_text() for rank in (0, 1)]


def test_each_key_does_what_it_does_elsewhere_and_changes_no_loss(small, tmp_path):  # noqa: F811
    _two_ranks(small, tmp_path / "plain")
    logs = _two_ranks(
        small,
        tmp_path / "watched",
        steps_per_print=2,
        log_level="info",
        wall_clock_breakdown=True,
        tensorboard={"enabled": True, "output_path": str(tmp_path / "boards"), "job_name": "job"},
        csv_monitor={"enabled": True, "output_path": str(tmp_path / "tables"), "job_name": "job"},
        comms_logger={"enabled": True, "verbose": True},
        flops_profiler={"enabled": True, "profile_step": 3, "output_file": str(tmp_path / "flops.txt")},
    )
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")
    assert list((tmp_path / "boards/job").glob("events*"))
    with open(tmp_path / "tables/job/Train_Samples_lr.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [int(row[0]) for row in rows] == [4, 8, 12, 16, 20, 24]  # samples
    tree = (tmp_path / "flops.txt").read_text()
    assert "Flops Profiler" in tree and "StackedExperts" in tree
    assert "time (ms)" in logs[0] and "fwd" in logs[0]
    assert "comm op: all_to_all_single" in logs[0]

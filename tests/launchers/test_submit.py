"""submit.py shows the script it would submit and refuses shapes that cannot work; with no cluster at hand.

What needs a cluster is in tests/cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ["pretrain", "--ds_config", str(ROOT / "ds_configs/zero2.json"), "--run_dir", "runs/a b"]

FINETUNE = ["finetune", "--checkpoint", str(ROOT), "--task", "sst2", "--run_dir", "x"]


def submit(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launchers/slurm/submit.py"), *arguments]
    environment = {**os.environ, "PATH": "/nowhere"}  # no sinfo, no sbatch
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=environment)


def test_the_dry_run_is_a_whole_script_with_the_options_in_front(tmp_path):
    result = submit("--dry_run", "--nodes", "2", "--tasks_per_node", "4", "--chain", "3", *PRETRAIN, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=2" in options and "#SBATCH --ntasks-per-node=4" in options
    assert sum(option.startswith("#SBATCH --nodes") for option in options) == 1, "its own value is gone"
    assert "#SBATCH --requeue" in options and "export VQMOE_REQUEUE=0" in lines
    assert f"export VQMOE_ROOT={ROOT}" in lines and any("'runs/a b'" in line for line in lines)
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0].startswith("export"), "sbatch reads options up to the first command only"
    assert lines.index(code[0]) > max(lines.index(option) for option in options)
    subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launchers/slurm").glob("*.s*")))
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(ROOT / "launchers/slurm" / script)], check=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nodes", "2", *PRETRAIN, "--ep_size", "4"], "expert-parallel size 4 does not divide the 2 ranks"),
        (["--nodes", "3", *PRETRAIN, "--ep_size", "3"], "batch sizes contradict"),
        (["--gpus_per_node", "8", *PRETRAIN], "--tasks_per_node 1 and --gpus_per_node 8 differ"),
        (["--nodes", "0", *PRETRAIN], "--nodes 0 is too small"),
        (PRETRAIN[:3], "give pretrain a --run_dir"),
        (["finetune", "--checkpoint", "runs/x", "--task", "sst2"], "give finetune a --run_dir"),
        (
            ["finetune", "--checkpoint", "no/run", "--task", "sst2", "--run_dir", "x"],
            "checkpoint no/run does not exist",
        ),
        ([*FINETUNE, "--ep_size", "2"], "--ep_size 2 does not divide the 1 ranks of this job"),
        (["--dry_run", "compare", "grid.yaml", "--out", "x"], "give --array 0-N"),
        (["--chain", "2", "evaluate", "runs/x"], "--chain is for pretrain and finetune, not for evaluate"),
        (["evaluate", "runs/x"], "sbatch is not on this machine"),
    ],
)
def test_what_cannot_work_is_refused_with_one_sentence(tmp_path, arguments, sentence):
    result = submit(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1

"""The SLURM scripts' common part, in a shell with a command ``scontrol`` of ours: what a job does as its ranks end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.test_grid import grid_file  # noqa: F401

SCRIPTS = Path(__file__).parents[2] / "launchers/slurm"
REQUEUED = "exit code 134: requeued, to go on from the start"


@pytest.fixture
def shell(tmp_path: Path):
    """Runs a script as job 1; returns its code and what it says."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"  # a requeue fails, or the job would wait for its end
    scontrol.write_text(
        f"""#!/bin/sh
        [ "$1" = show ] || {{ echo "$*"; exit 1; }}
        [ "$3" != 1 ] || echo JobState=RUNNING
        cat "{tmp_path}/state"
        """
    )
    scontrol.chmod(0o755)
    (tmp_path / "state").write_text("")

    def run(*command: str) -> tuple[int, str]:
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
        done = subprocess.run(
            ["bash", "-uo", "pipefail", *command],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def job(shell, tmp_path: Path):
    """Runs ``train`` with ranks that do what is given; returns the code of the job and what it says."""
    (tmp_path / "run").mkdir()
    return lambda ranks: shell("-c", f'. "{SCRIPTS}/common.sh"; ranks() {{ {ranks}; }}; train x.py --run_dir run')


def test_a_rank_that_dies_after_the_end_of_the_run_fails_no_job(job) -> None:
    code, said = job("echo 60 >run/summary.json; return 134")
    assert code == 0 and "code 134 after the run was finished: nothing is lost" in said and "requeued" not in said


def test_a_report_of_an_earlier_end_is_none_of_this_one(job, tmp_path: Path) -> None:
    (tmp_path / "run/summary.json").write_text("60")
    code, said = job("return 134")
    assert code == 134 and REQUEUED in said


def test_a_later_job_of_a_chain_leaves_it_to_the_launcher_whether_the_run_is_finished(
    job, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("SLURM_JOB_DEPENDENCY", "afterok:7(unfulfilled)")
    (tmp_path / "run/summary.json").write_text("60")
    assert job("echo goes on; return 0") == (0, "goes on\n")


def test_a_rank_that_dies_before_the_end_requeues_the_job(job) -> None:
    code, said = job("return 134")
    assert code == 134 and REQUEUED in said


def test_a_task_of_an_array_asks_for_itself_alone(job, monkeypatch, tmp_path: Path) -> None:
    """Its job number may be that of the array, by which SLURM means all tasks, of which another one runs here."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    (tmp_path / "state").write_text("JobState=CANCELLED\n")
    assert job("return 75") == (75, "")
    (tmp_path / "state").write_text("JobState=RUNNING\n")
    assert "requeue 1_3\n" in job("return 75")[1]


def test_a_task_of_a_comparison_finds_its_run_in_a_folder_with_spaces(shell, grid_file, monkeypatch, tmp_path):  # noqa: F811
    python = tmp_path / "bin/python"  # a run is asked to stop
    python.write_text(f'#!/bin/sh\ncase $* in *--list*) exec "{sys.executable}" "$@" ;; esac\nexit 75\n')
    python.chmod(0o755)
    run_dir = tmp_path / "my grid/words/codes/seed-2"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints/latest").write_text("global_step0000002")
    (tmp_path / "state").write_text("JobState=RUNNING\n")
    monkeypatch.setenv("VQMOE_ROOT", str(SCRIPTS.parents[1]))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    code, said = shell(f"{SCRIPTS}/compare_array.sbatch", grid_file(), "--out", "my grid")
    assert code == 75 and "to go on from my grid/words/codes/seed-2/checkpoints/global_step0000002\n" in said
    assert (run_dir / "requeue.state").exists()


def test_a_long_answer_of_slurm_hides_no_state(job, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("JobState=PENDING\n" * 100_000)
    assert "requeue 1\n" in job("return 75")[1]


def test_other_codes_end_the_job_as_they_are(job) -> None:
    assert job("return 0") == (0, "") and job("return 2") == (2, "")
    assert job("echo 60 >run/summary.json; return 3") == (3, "")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("VQMOE_STUCK", "three", "is not a whole number"),
        ("VQMOE_STUCK", "-1", "is not a whole number"),
        ("VQMOE_WAIT", "30s", "is not a whole number"),
        ("VQMOE_WAIT", "999999999", "is not a whole number of at most 8 digits"),
        ("VQMOE_REQUEUE", "no", "is unknown; it is 1 or 0"),
    ],
)
def test_what_is_read_at_the_end_of_a_job_is_checked_at_its_start(job, monkeypatch, name, value, told) -> None:
    monkeypatch.setenv(name, value)
    code, said = job("return 134")
    assert code == 2 and said.startswith(f"error: {name}={value} {told}") and said.count("\n") == 1
    monkeypatch.setenv(name, "")
    assert REQUEUED in job("return 134")[1], "empty is as not set"

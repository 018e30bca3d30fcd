"""What goes wrong under a training: the code that the docs name comes, with a sentence, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import warm
from tests.distributed import _free_port
from tests.launchers.test_pretrain import LAUNCHER, ROOT, SMALL, _wait_for, environment, losses
from vqmoe_ds.checkpoint.io.store import find_newest, verify
from vqmoe_ds.runtime.lock import RunLock

ENDLESS = ["--train_steps", "1000000", "--set", "run.log_every=5", "--set", "run.save_every=50"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run whose closing validation takes long."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "text.txt").write_text(
        "".join(f"{i} little words make {i * i % 97} long stories. " for i in range(40000))
    )
    arguments = ["--ds_config", str(ROOT / "ds_configs/zero2.json"), "--config", str(folder / "small.yaml")]
    return [*arguments, "--data", str(folder / "text.txt")]


def start(arguments: list[str], launcher: list[str] = LAUNCHER) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    popen = warm.Popen if launcher is LAUNCHER else subprocess.Popen
    return popen([*launcher, *arguments], stdout=pipe, stderr=pipe, text=True, env=environment())


def _move(run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name("moved"))


def _fill(run_dir: Path) -> None:
    link = run_dir / "full"
    link.symlink_to("/dev/full")
    link.replace(run_dir / "metrics.jsonl")  # at once: the run makes the file anew where it is missing


def _make_read_only(run_dir: Path) -> None:
    # Over itself: a file system with open files is not made read-only, nor is this one while a file is being written.
    subprocess.run(["mount", "-o", "bind", run_dir, run_dir], check=True)
    deadline = time.monotonic() + 20
    while subprocess.run(["mount", "-o", "remount,bind,ro", run_dir, run_dir], capture_output=True).returncode:
        assert time.monotonic() < deadline, "the folder stays busy"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (_move, "No such file or directory|it was moved or deleted"),
        (_fill, "No space left on device"),
        pytest.param(
            *(_make_read_only, "Read-only file system"),
            marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can mount"),
        ),
    ],
)
def test_what_cannot_be_written_ends_with_code_3_and_names_the_last_good_checkpoint(
    small: list[str], tmp_path: Path, fault: Callable[[Path], None], reason: str
) -> None:
    mounts = fault is _make_read_only
    if mounts and subprocess.run(["mount", "--bind", tmp_path, tmp_path], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    run_dir = tmp_path / "run"
    process = start([*small, "--run_dir", str(run_dir), *ENDLESS])
    try:
        _wait_for((run_dir / "checkpoints/global_step0000100").exists, process)  # the one before is sealed
        fault(run_dir)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 3, said
        [sentence] = said.splitlines()
        assert any(part in sentence for part in reason.split("|")), sentence
        assert "checkpoints/global_step0000" in sentence and "start the same command again" in sentence
        kept = (run_dir if fault is not _move else run_dir.with_name("moved")) / "checkpoints"
        assert find_newest(kept).path is not None
        assert fault is not _move or not list(run_dir.rglob("global_step*")), "nothing is begun where the folder was"
    finally:
        process.kill()
        process.wait()
        if mounts:
            subprocess.run(["umount", "--recursive", tmp_path], check=True)


def test_a_signal_in_the_closing_validation_is_answered_at_once_and_the_report_comes_later(
    small: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = [*small, "--run_dir", str(run_dir), "--set", "data.holdout_every=2"]
    process = start(arguments)
    _wait_for((run_dir / "checkpoints/global_step0000012").exists, process)
    time.sleep(0.3)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert time.monotonic() - started < 5
    assert "stopped by SIGTERM; the same command goes on" in said
    assert not (run_dir / "summary.json").exists()
    again = start([*arguments, "--set", "run.final_eval_windows=64"])
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert "on 64 of " in said
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 12


def test_a_run_folder_in_use_is_refused_on_all_ranks(small: list[str], tmp_path: Path) -> None:
    lock, pipe = RunLock(tmp_path), subprocess.PIPE
    options = {"stdout": pipe, "stderr": pipe, "text": True}
    command = [*LAUNCHER, *small, "--run_dir", str(tmp_path)]
    ranks = warm.start_ranks(2, command, _free_port(), environment(), **options)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    lock.release()
    assert [rank.returncode for rank in ranks] == [2, 2], "a job script would requeue 76"
    assert f"run folder {tmp_path} is in use by process {os.getpid()}" in said[0] and said[1] == ""


def test_a_killed_launcher_leaves_a_checkpoint_and_no_rank(small: list[str], tmp_path: Path) -> None:
    run_dir, two = tmp_path / "run", [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    process = start([*small, "--run_dir", str(run_dir), *ENDLESS], [*two, str(ROOT / "launchers/pretrain.py")])
    _wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) > 2, process)
    process.kill()
    killed = time.monotonic()
    process.communicate(timeout=60)  # the ranks hold its output
    assert time.monotonic() - killed < 10
    newest = find_newest(run_dir / "checkpoints").path
    assert newest is not None
    assert verify(newest)["step"] >= max(losses(run_dir))


def test_a_stopped_rank_ends_the_command_within_twice_the_timeout(small: list[str], tmp_path: Path) -> None:
    run_dir, two = tmp_path / "run", [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    timeout = ["--set", "run.peer_timeout=8"]
    process = start(
        [*small, "--run_dir", str(run_dir), *ENDLESS, *timeout], [*two, str(ROOT / "launchers/pretrain.py")]
    )
    _wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) > 2, process)
    ranks = subprocess.run(["pgrep", "-f", f"local_rank=1.*{run_dir}"], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGSTOP)
    stopped = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 76
    assert time.monotonic() - stopped < 16
    assert "rank 1 on" in said and "no sign of life for" in said

"""One job at a time in a run folder; the dead hold no lock. The other job is a real process."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from vqmoe_ds.runtime.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "SLURM_JOB_ID": "41"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_job_is_told_who_holds_the_folder(tmp_path, holder):
    sentence = rf"run folder {re.escape(str(tmp_path))} is in use by process {holder.pid} on \S+ \(SLURM job 41\) since"
    with pytest.raises(ConfigError, match=sentence):
        RunLock(tmp_path)


def test_a_killed_job_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    started = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("pid", ["1e999", str(10**30)])
def test_a_lock_whose_text_was_damaged_is_free(tmp_path, pid):
    for text in (f'{{"host": "{socket.gethostname()}", "pid": {pid}}}', "[" * 9_999):
        (tmp_path / "run.lock").write_text(text)
        RunLock(tmp_path).release()


def test_a_released_lock_is_free_at_once_and_says_so(tmp_path):
    RunLock(tmp_path).release()
    assert (tmp_path / "run.lock").read_text() == ""
    RunLock(tmp_path).release()


def _held_elsewhere(folder: Path, **entries: object) -> Path:
    """A lock file as a job on another host leaves it, where the file system keeps locks to a host."""
    path = folder / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "slurm_job": None, **entries}))
    return path


@pytest.mark.parametrize("job", [None, "41"], ids=["no job", "another step of the job"])
def test_without_locks_between_hosts_a_heartbeat_refuses(tmp_path, monkeypatch, job):
    path, stop = _held_elsewhere(tmp_path, slurm_job=job), threading.Event()
    monkeypatch.setenv("SLURM_JOB_ID", "41")

    def beat() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"):
            RunLock(tmp_path, patience=5)
    finally:
        stop.set()
        thread.join()


def test_without_a_heartbeat_the_other_host_s_lock_is_taken_over_after_the_wait(tmp_path):
    _held_elsewhere(tmp_path)
    started = time.monotonic()
    lock = RunLock(tmp_path, beat=0.05, patience=0.5)
    assert time.monotonic() - started >= 0.5
    entry, touched = json.loads((tmp_path / "run.lock").read_text()), (tmp_path / "run.lock").stat().st_mtime_ns
    assert entry["pid"] == os.getpid()
    time.sleep(0.3)
    assert (tmp_path / "run.lock").stat().st_mtime_ns > touched, "it beats"
    lock.release()


def test_a_requeued_job_need_not_wait_for_itself(tmp_path, monkeypatch):
    _held_elsewhere(tmp_path, slurm_job="41")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    started = time.monotonic()
    RunLock(tmp_path, patience=5).release()
    assert time.monotonic() - started < 1

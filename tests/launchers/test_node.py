"""One torchrun a node: what SLURM tells it reaches the ranks, and what they end with is its own exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launchers.test_pretrain import ROOT, environment

RANK = """
import os, pathlib, signal, time
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
pathlib.Path(os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize(("fault", "code"), [("a signal to all", 75), ("a killed rank", 137)])
def test_signals_reach_the_ranks_and_their_exit_code_comes_back(tmp_path, fault, code):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, ROOT / "launchers/slurm/node.py", "--nproc_per_node", "2", "rank.py"]
    node = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
            assert time.monotonic() < deadline and node.poll() is None
            time.sleep(0.05)
        if fault == "a killed rank":
            subprocess.run(["kill", "-9", (tmp_path / "1").read_text()], check=True)
        else:
            node.send_signal(signal.SIGUSR1)
        assert node.wait(30) == code
        assert not any(Path("/proc", (tmp_path / rank).read_text()).exists() for rank in "01"), "nobody stays behind"
    finally:
        node.kill()
        node.wait()

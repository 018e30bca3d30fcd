"""The console under a real launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOW = "from vqmoe_ds.runtime.console import Console as C; import sys; print(sys.stdout.isatty(), C(0).live)"


def test_the_terminal_that_mpirun_makes_of_a_pipe_gets_plain_lines():
    root = {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    command = [Path(sys.executable).with_name("mpirun"), "-n", "1", sys.executable, "-c", SHOW]
    environ = {**os.environ, **root, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert result.stdout.split() == ["True", "False"], result.stderr

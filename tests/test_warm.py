"""The other harness: a command that is forked is as one that a new interpreter runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vqmoe_ds.runtime.stopping
from tests import warm

SHOW = """
import logging, os, signal, sys, tempfile, warnings
print(sys.argv, os.getcwd(), sorted(os.environ), sys.stdin.read(), __name__, tempfile.gettempdir())
print([name for name in sys.modules if name.startswith("vqmoe_ds")], logging.getLogger().handlers)
print([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ)])
print(sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:3], sys.stdout.isatty())
warnings.warn("a word of warning")
print("and an error", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("kind", ["code", "script", "module"])
def test_it_shows_what_a_new_interpreter_shows(kind: str, tmp_path: Path) -> None:
    assert vqmoe_ds.runtime.stopping, "the parent has the package"
    (tmp_path / "show.py").write_text(SHOW)
    words = {"code": ["-c", SHOW], "script": [str(tmp_path / "show.py")], "module": ["-m", "show"]}[kind]
    place = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "LC_ALL": "C.UTF-8"}
    told = [
        run(
            [sys.executable, *words, "a b"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=place,
            stdin=subprocess.DEVNULL,
        )
        for run in (subprocess.run, warm.run)
    ]
    assert [one.returncode for one in told] == [3, 3]
    assert told[0].stdout == told[1].stdout
    assert "a word of warning" in told[1].stderr and told[0].stderr == told[1].stderr


def test_a_signal_and_an_exception_end_it_as_they_do() -> None:
    killed = warm.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])
    assert killed.returncode == -signal.SIGTERM
    code = "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: os._exit(7)"
    interrupted = warm.run(
        [sys.executable, "-c", code], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    assert interrupted.returncode == 7
    failed = warm.run([sys.executable, "-c", "import atexit; atexit.register(print, 'left'); 1 / 0"],
                      capture_output=True, text=True)  # fmt: skip
    assert (failed.returncode, failed.stdout) == (1, "left\n") and "ZeroDivisionError" in failed.stderr


def test_what_is_done_before_the_start_holds() -> None:
    def close_stdout() -> None:
        os.close(1)

    done = warm.run(
        [sys.executable, "-c", "import os; os.write(1, b'x')"], capture_output=True, preexec_fn=close_stdout
    )
    assert done.returncode == 1 and b"Bad file descriptor" in done.stderr

"""How commands of one process meet their terminal and their end."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqmoe_ds.runtime import terminal
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.terminal import run_tool

ROOT = Path(__file__).resolve().parents[2]
TRAININGS = ("__init__", "pretrain", "finetune", "evaluate")
"""Of several ranks: they have ``runtime/console.py`` and ``runtime/stopping.py`` instead."""
TOOLS = [path for path in sorted((ROOT / "vqmoe_ds/commands").glob("*.py")) if path.stem not in TRAININGS]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_every_tool_is_run_so(tool: Path) -> None:
    assert re.search(r"^main = command\(|^    return run_tool\(", tool.read_text(encoding="utf-8"), re.MULTILINE)
    assert (ROOT / "vqmoe_ds/commands/__init__.py").read_text("utf-8").count("    return run_tool(") == 1


def test_characters_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="iso-8859-1"))

    def main() -> int:
        print("é 日本 \udcff", flush=True)
        raise DataError("no file ‘日’")

    assert run_tool(main) == 2
    sys.stderr.flush()
    assert written.getvalue() == rb"\xe9 \u65e5\u672c \udcff" + b"\nerror: no file " + rb"\u2018\u65e5\u2019" + b"\n"


def test_a_daemon_may_have_closed_every_stream() -> None:
    words = """if True:
        import sys
        from vqmoe_ds.runtime.terminal import run_tool
        sys.exit(run_tool(lambda: print(sys.stdin.read(), sys.stdin.isatty(), sys.stdout.isatty()) or 7))
    """
    command = ["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, words]
    assert subprocess.run(command, cwd=ROOT).returncode == 7


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_clears_up_and_is_said_in_a_line(number, code, capsys, monkeypatch) -> None:
    monkeypatch.setattr(terminal.threading, "active_count", lambda: 1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    cleared = []

    def main() -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except Exception:  # what many a library does
            return 1
        finally:
            cleared.append(True)
        return 0

    try:
        assert run_tool(main) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert cleared and capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_reader_that_has_seen_enough() -> None:
    words = "from vqmoe_ds.runtime import terminal; exit(terminal.run_tool(lambda: print('x\\n' * 10**6) or 0))"
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" | head -n 1; echo ${PIPESTATUS[0]}', sys.executable, words],
                          **{"cwd": ROOT, "capture_output": True, "text": True})  # fmt: skip
    assert (done.stdout, done.stderr) == ("x\n0\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_no_room_for_the_output() -> None:
    words = "import sys; from vqmoe_ds.runtime.terminal import run_tool; sys.exit(run_tool(lambda: print('x') or 0))"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == b"error: the output cannot be written (No space left on device); free some room\n"


def _ended_by(number: int, command: list[str], said: str, folder: Path) -> str:
    """What a command says after a signal, sent as soon as it has said something; it must be gone within 5 s."""
    process = subprocess.Popen(
        [sys.executable, *command],
        **{"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE, "text": True},
    )
    assert process.stderr is not None
    while said not in (line := process.stderr.readline()):
        assert line
    time.sleep(0.5)
    process.send_signal(number)
    rest = process.communicate(timeout=5)[1]
    assert process.returncode == 128 + number
    return rest


def test_a_library_that_computes_on_is_left(tmp_path: Path) -> None:
    words = ["".join(chr(97 + i * j % 26) for j in range(1, 3 + i % 7)) + str(i) for i in range(40_000)]
    (tmp_path / "t.txt").write_text("\n".join(" ".join(words[i::400]) for i in range(400)) * 8, encoding="utf-8")
    command = [str(ROOT / "tools/train_tokenizer.py"), "t.txt", "--output", "out.tokenizer"]
    assert _ended_by(signal.SIGTERM, command, "training a unigram", tmp_path) == "interrupted\n"
    assert os.listdir(tmp_path) == ["t.txt"]


_SLOW = """
import sys, time
from vqmoe_ds.data import parts, prepare
from vqmoe_ds.runtime.terminal import run_tool
def slowly(self, unit, folder):
    print("begun", file=sys.stderr, flush=True)
    time.sleep(60)
parts.Parts._write = slowly
words = ["t.txt", "--output", "p", "--workers", "2"]
sys.exit(run_tool(lambda: prepare.main(prepare.build_parser("").parse_args(words))))
"""


def test_workers_end_with_the_command_and_leave_nothing_half_made(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some words\n" * 400_000, encoding="utf-8")
    said = _ended_by(signal.SIGTERM, ["-c", _SLOW], "begun", tmp_path)
    assert said.splitlines()[-1].startswith("interrupted; give the same command again") and "Traceback" not in said
    assert os.listdir(tmp_path / "p.parts") == ["lock"]

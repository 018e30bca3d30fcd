"""Requests to stop: heard while the main thread waits in C++, deferred while there is something to save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vqmoe_ds.runtime import parents

_HEAR = """
import os, signal, sys, time
from vqmoe_ds.runtime.stopping import STOP
def leave(reason):
    print(reason, flush=True)
    os._exit(75)
STOP.listen(leave)
"""
_WAIT = """
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print("ready", flush=True)
store.get("what nobody sets")
"""
_SAVE = """
STOP.defer()
print("ready", flush=True)
while STOP.reason is None:
    time.sleep(0.01)
print("saved", flush=True)
STOP.act()
"""
_SAVE_FOR_EVER = """
STOP.defer()
print("ready", flush=True)
while True:
    time.sleep(0.01)
    if STOP.reason is not None:
        print("saving", flush=True)
"""
_FORK = """
STOP.defer()
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
print("ended by", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), STOP.reason, flush=True)
"""


def _start(code: str, **more: object) -> subprocess.Popen[str]:
    from tests import warm  # not for the tests of launchers, one of which another pytest runs

    return warm.Popen([sys.executable, "-c", _HEAR + code], stdout=subprocess.PIPE, text=True, **more)


def _ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_process_that_waits_in_cpp(number: signal.Signals) -> None:
    process = _start(_WAIT)
    _ready(process)
    started = time.monotonic()
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == f"{number.name}\n"
    assert process.returncode == 75
    assert time.monotonic() - started < 15


def test_while_there_is_something_to_save_a_request_waits() -> None:
    process = _start(_SAVE)
    _ready(process)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved\nSIGTERM\n"
    assert process.returncode == 75


def test_pressing_ctrl_c_twice_does_not_wait_for_the_save() -> None:
    process = _start(_SAVE_FOR_EVER)
    _ready(process)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    process = _start(_SAVE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    _ready(process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved\nSIGTERM\n"


def test_a_forked_child_ends_as_any_process_and_does_not_speak_for_its_parent() -> None:
    assert _start(_FORK).communicate(timeout=20)[0] == "ended by -15 None\n"


# ---------------------------------------------------------------- launchers that are killed

_RANK = """
import os, sys, time
from pathlib import Path
from vqmoe_ds.runtime.parents import watch_launcher
from vqmoe_ds.runtime.stopping import STOP
rank = os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))
def leave(reason):
    Path(f"left{rank}").write_text(reason)
    os._exit(75)
STOP.listen(leave)
if Path("slow").exists():  # a launcher that is killed while its ranks start
    Path(f"rank{rank}").write_text(f"{os.getpid()} {os.getppid()}")
    while not Path("go").exists():
        time.sleep(0.01)
watch_launcher(STOP.request)
Path(f"rank{rank}").write_text(f"{os.getpid()} {os.getppid()}")
time.sleep(100)
"""
_BIN = Path(sys.executable).parent
_DEEPSPEED = [str(_BIN / "deepspeed"), "--num_gpus", "2"]
_TORCHRUN = [str(_BIN / "torchrun"), "--nproc_per_node", "2"]
_MPIRUN = [str(_BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]


@pytest.mark.parametrize(
    ("command", "who", "when"),
    [
        (_DEEPSPEED, "launcher", "running"),
        (_DEEPSPEED, "parent", "running"),
        (_DEEPSPEED, "parent", "starting"),
        (_TORCHRUN, "launcher", "running"),
        pytest.param(
            *(_MPIRUN, "launcher", "running"),
            marks=pytest.mark.skipif(not Path(_MPIRUN[0]).exists(), reason="no Open MPI"),
        ),
    ],
)
def test_ranks_leave_when_their_launcher_is_killed(command: list[str], who: str, when: str, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(_RANK)
    if when == "starting":
        (tmp_path / "slow").touch()
    environment = {**os.environ, "PATH": f"{_BIN}:{os.environ['PATH']}", "PYTHONPATH": str(Path.cwd())}
    nothing = subprocess.DEVNULL
    launcher = subprocess.Popen([*command, "rank.py"], cwd=tmp_path, env=environment, stdout=nothing, stderr=nothing)
    try:
        places = [[int(n) for n in _text(tmp_path / f"rank{rank}", 60).split()] for rank in (0, 1)]
        time.sleep(1.5)  # several looks: nothing is amiss yet
        assert not list(tmp_path.glob("left*"))
        os.kill(launcher.pid if who == "launcher" else places[0][1], signal.SIGKILL)
        killed = time.monotonic()
        if when == "starting":
            time.sleep(0.5)
            (tmp_path / "go").touch()
        assert "the end of its launcher" in _text(tmp_path / "left0", 30)
        while any(_alive(pid) for pid, _ in places):
            assert time.monotonic() - killed < 40
            time.sleep(0.05)
    finally:
        launcher.kill()
        launcher.wait()


@pytest.mark.skipif(
    subprocess.run(["unshare", "-pf", "--mount-proc", "true"], capture_output=True).returncode != 0,
    reason="may not make a process namespace",
)
def test_ranks_leave_in_a_container_whose_first_process_is_of_their_session() -> None:
    """Where ``docker run`` starts the job, process 1 inherits the orphans and has their session."""
    name = "test_ranks_leave_when_their_launcher_is_killed and parent-starting"
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", __file__, "-k", name]
    inside = subprocess.run(["unshare", "-pf", "--mount-proc", *pytest_], capture_output=True, text=True, timeout=200)
    assert inside.returncode == 0 and "1 passed" in inside.stdout, inside.stdout


def test_a_launcher_that_is_still_exiting_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its end and the adoption of its children a process has no command line and no environment."""
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    look = parents.process

    def process(pid: int) -> parents.Process | None:
        found = look(pid)
        return replace(found, words=("",)) if found is not None and pid == os.getppid() else found

    monkeypatch.setattr(parents, "process", process)
    monkeypatch.setattr(parents, "_was_started_with", lambda variable, pid: False)
    reasons: list[str] = []
    parents.watch_launcher(reasons.append)
    deadline = time.monotonic() + 30
    while not reasons and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reasons == ["the end of its launcher"]


def test_a_wrapper_between_a_launcher_and_its_rank_is_no_orphan(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(_RANK)
    environment = {**os.environ, "RANK": "0", "CROSS_RANK": "0", "PYTHONPATH": str(Path.cwd())}
    wrapper = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} rank.py; true"], cwd=tmp_path, env=environment, start_new_session=True
    )
    try:
        _text(tmp_path / "rank0", 30)
        time.sleep(1.5)
        assert wrapper.poll() is None and not (tmp_path / "left0").exists()
    finally:
        os.killpg(wrapper.pid, signal.SIGKILL)
        wrapper.wait()


def test_a_shell_that_ends_is_no_launcher(tmp_path: Path) -> None:
    """A run that was sent to the background goes on when its shell or terminal goes."""
    (tmp_path / "rank.py").write_text(_RANK)
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(Path.cwd())}
    subprocess.run(["sh", "-c", f"{sys.executable} rank.py &"], cwd=tmp_path, env=environment, check=True)
    pid = int(_text(tmp_path / "rank0", 30).split()[0])
    try:
        time.sleep(2.5)
        assert _alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def _text(path: Path, patience: float) -> str:
    deadline = time.monotonic() + patience
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.02)
    return path.read_text()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


_IMPORT = """
import importlib, importlib.abc, sys, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith(("vqmoe_ds.config", "vqmoe_ds.finetune", "vqmoe_ds.evaluation", "vqmoe_ds.data")):
            print("ready", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
command = importlib.import_module("vqmoe_ds.commands." + sys.argv.pop(1))
sys.exit(command.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("pretrain", "the same command goes on"),
        ("finetune", "the same command goes on"),
        ("evaluate", "nothing was written; start it again"),
    ],
)
def test_a_signal_is_answered_while_modules_are_still_imported(
    command: str, remedy: str, number: signal.Signals
) -> None:
    process = subprocess.Popen([sys.executable, "-c", _IMPORT, command], stdout=subprocess.PIPE, text=True)
    _ready(process)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == f"stopped by {number.name}; {remedy}\n"
    assert process.returncode == 75


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["prepare", "train_tokenizer", "inspect_routing"])
def test_a_tool_that_is_interrupted_while_it_is_imported_has_no_traceback(
    command: str, number: signal.Signals, code: int
) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", _IMPORT, command], **pipes)
    _ready(process)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", "interrupted\n")
    assert process.returncode == code

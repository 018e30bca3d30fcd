"""Commands of this repository in processes of their own, whose imports are done: forks instead of new interpreters.

``Popen`` and ``run`` take what those of ``subprocess`` do: ``[sys.executable, script, ...]``, or with ``-m`` or ``-c``.
Most of what a command of a second costs is the import of torch and DeepSpeed; a fork of the tests' own process has
them. Streams, environment, working folder, signals, exit code and ``vqmoe_ds`` itself are those of a new process. What
a test says about imports, memory or the first lines of an interpreter needs a real one.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.distributed import import_what_engines_import, take_own_bars

_CHANGED_BY_PYTEST = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)


_LIBRARIES = (
    *("yaml", "safetensors", "torch.utils.tensorboard", "matplotlib.pyplot", "matplotlib.backends.backend_agg"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.comm.mori", "sklearn.metrics"),
)


@functools.cache
def _import_what_commands_import() -> None:
    for name in _LIBRARIES:
        importlib.import_module(name)
    import_what_engines_import()


class Popen(subprocess.Popen[Any]):
    """``subprocess.Popen`` of a Python command that starts warm."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        preexec_fn: Callable[[], object] | None = None,
        **options: Any,
    ) -> None:
        assert command[0] == sys.executable
        _import_what_commands_import()
        environment = dict(os.environ if env is None else env)
        words = [os.fspath(word) for word in command[1:]]
        # It runs in the child, where it never returns: nothing is executed in its place.
        super().__init__(command, preexec_fn=partial(_become, words, environment, preexec_fn), **options)


def run(command: Sequence[str], timeout: float | None = None, **options: Any) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run`` of a Python command that starts warm."""
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def start_ranks(
    count: int, command: Sequence[str], port: int, env: Mapping[str, str], cold: bool = False, **options: Any
) -> list[subprocess.Popen[Any]]:
    """The ranks of a command on this machine, as a launcher starts them; they meet at ``port``; ``cold``: no forks."""
    start = subprocess.Popen if cold else Popen
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [
        start(command, env={**env, **meeting, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(count)
    ]


def _become(words: list[str], environment: dict[str, str], prepare: Callable[[], object] | None) -> None:
    code: Any = 1
    try:
        # Those of the parent; on one of them it waits for the start.
        os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 1 << 16))
        _forget_the_tests(environment)
        if prepare is not None:
            prepare()
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as Python does at its start
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _execute(words)
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code if isinstance(code, int) else int(code is not None))


def _forget_the_tests(environment: dict[str, str]) -> None:
    """Streams, signals, warnings, logging and modules as in a new interpreter."""
    gc.enable()
    take_own_bars()
    faulthandler.disable()
    signal.set_wakeup_fd(-1)
    for number in _CHANGED_BY_PYTEST:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python does at its start
        signal.signal(number, signal.SIG_IGN)
    old = {sys.stdout: "stdout", sys.stderr: "stderr"}
    sys.stdin = sys.__stdin__ = os.fdopen(0)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w")
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    _forget_logging(old)
    importlib.reload(warnings)  # pytest records them
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    tempfile.tempdir = None
    os.environ.clear()
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vqmoe_ds"]:
        del sys.modules[name]


def _forget_logging(old: dict[Any, str]) -> None:
    """Handlers of pytest go; those of libraries write to the streams of this process."""
    logging.getLogger().handlers.clear()
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stdout if old.get(handler.stream) == "stdout" else sys.stderr


def _execute(words: list[str]) -> None:
    words = [word for word in words if word != "-u"]
    kind = words[0]
    if kind == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[2:]], [""]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv, sys.path[:0] = words[1:], [os.getcwd()]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(kind).resolve().parent)]
        runpy.run_path(kind, run_name="__main__")


def _leave(code: int) -> None:
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)

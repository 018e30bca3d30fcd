"""Terminal and exit of every command of one process (``tools/*.py``).

Trainings and evaluations of several ranks have ``runtime/console.py`` and ``runtime/stopping.py`` instead.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from io import TextIOWrapper
from typing import Any

from vqmoe_ds.runtime.errors import UserError
from vqmoe_ds.runtime.files import drop_output


class Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds as Ctrl-C does, so that every ``finally`` clears what is half-written."""


def run_tool(main: Callable[[], int]) -> int:
    """Run a command; its exit code: that of ``main``, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.

    Characters that the terminal's encoding lacks are printed as escapes; a reader that has seen enough (``| head``) is
    no error.

    Args:
        main: reads the command line and does the work.
    """
    print_records()
    # A daemon may have closed them, and Python has None in their place.
    sys.stdin, sys.stdout, sys.stderr = (
        stream or open(os.devnull, mode)  # noqa: SIM115
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    for stream, instead in ((sys.stdin, "surrogateescape"), (sys.stdout, ESCAPES), (sys.stderr, ESCAPES)):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=instead)
    try:
        with _hearing(_terminate, signal.SIGTERM):
            code = main()
            sys.stdout.flush()
            return code
    except UserError as error:
        return error.report()
    except BrokenPipeError:
        drop_output()
        return 0
    except OSError as error:  # of a file that we know by name, whoever opened it has said it
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None:
            raise
        drop_output()
        return UserError(f"the output cannot be written ({error.strerror}); free some room").report()
    except KeyboardInterrupt as stop:
        return _interrupted(stop)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def importing() -> AbstractContextManager[None]:
    """Context of a command's imports, in which Ctrl-C and SIGTERM end the process at once, without a traceback.

    A library that is interrupted halfway through its import may even panic.
    """
    return _hearing(_leave, signal.SIGINT, signal.SIGTERM)


@contextmanager
def _hearing(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    """Let a handler take signals that have Python's own, unless whoever started this process had them ignored."""
    usual: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    ours = [number for number in numbers if signal.getsignal(number) == usual[number]]
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers.
        ours = []
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, usual[number])


def _leave(number: int, frame: Any) -> None:
    with suppress(OSError):
        print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + number)


ESCAPES = "backslashreplace"
"""Error handler for characters that the terminal's encoding lacks."""


PACKAGE = "vqmoe_ds"
"""Name of the logger above those of all modules."""


class RecordPrinter(logging.Handler):
    """Prints log records as bare lines on standard error, but for those that a ``Console`` shows by itself."""

    def handle(self, record: logging.LogRecord) -> bool:
        # Without the handler's lock: a rank that has to leave must not wait for a thread whose terminal is blocked.
        if not hasattr(record, "rank"):
            with suppress(OSError):
                print(record.getMessage(), file=sys.stderr, flush=True)
        return True


def print_records() -> None:
    """Print the package's log records from INFO on, unless the program gave its logger handlers or a level."""
    logger = logging.getLogger(PACKAGE)
    if logger.handlers:
        return
    logger.addHandler(RecordPrinter())
    # A library that sets up the root logger would print each line a second time.
    logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def prints_records() -> bool:
    """Whether lines of the package go to the terminal: they do unless the program gave its logger other handlers."""
    return any(isinstance(handler, RecordPrinter) for handler in logging.getLogger(PACKAGE).handlers)


def exit_code_of(stop: KeyboardInterrupt) -> int:
    """128 and the number of the signal, as shells count."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def _interrupted(stop: KeyboardInterrupt) -> int:
    code = exit_code_of(stop)
    with suppress(OSError):
        print(str(stop) or "interrupted", file=sys.stderr, flush=True)
    if threading.active_count() > 1:  # a library that still computes would be waited for, or torn down as it runs
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    return code


def _terminate(number: int, frame: Any) -> None:
    raise Terminated

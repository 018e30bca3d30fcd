"""The terminal of a run of several ranks, its log files, and the logger of the package.

DeepSpeed, gloo and their dependencies write to stdout and stderr from Python and C++ alike. ``Console`` keeps
the terminal for this trainer's own lines and sends the rest to ``logs/rank{r}.log`` of the run folder.

Every line is a record of a logger below ``vqmoe_ds`` too. A program that embeds the trainer silences it by the logger's
level, and redirects it by giving that logger handlers before it calls the trainer: the terminal then shows nothing.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import traceback
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from vqmoe_ds.runtime.errors import UserError
from vqmoe_ds.runtime.terminal import ESCAPES, print_records, prints_records


class Console:
    """The user's terminal (rank 0) and the log file of this rank.

    Args:
        rank: only rank 0 prints; errors are printed by any rank that has one of its own.
        name: of the logger that the lines are records of, the caller's module.
    """

    def __init__(self, rank: int, name: str = __name__) -> None:
        self.rank = rank
        self.logger = logging.getLogger(name)
        print_records()
        self.out: TextIO = sys.stdout
        self.err: TextIO = sys.stderr
        self.log_path: Path | None = None
        self._of_defects = False
        self._bar: tqdm[Any] | None = None

    def capture(self, log_path: Path, of_defects: bool = False) -> None:
        """Point file descriptors 1 and 2 to ``log_path`` from now on; only ``say`` and ``fail`` reach the terminal.

        May be called again with another file.

        Args:
            of_defects: the log is of use after a defect alone: anything else that ends the process removes it.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        # Once: at later calls descriptors 1 and 2 are those of a log.
        if self.log_path is None:
            self.out, self.err = (os.fdopen(os.dup(number), "w", buffering=1, errors=ESCAPES) for number in (1, 2))
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, TextIOWrapper):
                    stream.reconfigure(errors=ESCAPES)
        self.log_path, self._of_defects = log_path, of_defects
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        # A crash in C++ has no other way to the user's terminal.
        faulthandler.enable(self.err)

    @property
    def live(self) -> bool:
        """Whether rank 0 writes to a terminal, where a progress line can move."""
        by_mpirun = "OMPI_COMM_WORLD_RANK" in os.environ  # it gives ranks a terminal though it writes to a file itself
        return self.rank == 0 and self.out.isatty() and not by_mpirun

    def say(self, line: str) -> None:
        """One line for the user, on rank 0."""
        if self.rank == 0 and self._shows(logging.INFO, line):
            if self._bar is not None:
                self._bar.clear()
            _print(line, self.out)
            if self.log_path is not None:
                _print(line, sys.stdout)

    def progress(self, done: int, total: int, line: str) -> None:
        """A moving line on a terminal, a plain one elsewhere."""
        if not self.live:
            self.say(line)
            return
        if not self._shows(logging.INFO, line):
            return
        if self._bar is None:
            layout = "{percentage:3.0f}%|{bar:20}| {desc}"
            self._bar = tqdm(total=total, initial=done, file=self.out, bar_format=layout, dynamic_ncols=True)
        self._bar.set_description_str(line, refresh=False)
        self._bar.n = done
        self._bar.refresh()
        _print(line, sys.stdout)

    def close_progress(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def drop_log(self) -> None:
        """Remove a log that only a defect would leave behind."""
        if self._of_defects and self.log_path is not None:
            self.log_path.unlink(missing_ok=True)

    def fail(self, error: BaseException) -> int:
        """Print what went wrong and return the exit code: one sentence for user errors, a traceback otherwise."""
        self.close_progress()
        code = error.exit_code if isinstance(error, UserError) else 1
        if isinstance(error, UserError):
            self.drop_log()
            if self.rank == 0 or error.local:
                self._complain(f"error: {error}")
        else:
            self._complain(f"rank {self.rank} failed:\n{''.join(traceback.format_exception(error))}")
            if self.log_path is not None:
                self._complain(f"what came before it is in {self.log_path}")
        return code

    def _complain(self, line: str) -> None:
        if self._shows(logging.ERROR, line):
            _print(line, self.err)

    def _shows(self, level: int, line: str) -> bool:
        """Hand a line to the logger; whether the terminal and the log file of the rank show it as well."""
        self.logger.log(level, line, extra={"rank": self.rank})
        return self.logger.isEnabledFor(level) and prints_records()


def _print(line: str, file: TextIO) -> None:
    """A terminal that is gone, a reader that has seen enough and a log on a full disk do not end a training."""
    with suppress(OSError):
        print(line, file=file, flush=True)

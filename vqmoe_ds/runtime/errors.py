"""The errors a user can cause, each carrying one clear sentence.

The launchers print the sentence once, on rank 0, and exit with ``exit_code``; anything else that
escapes is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import functools
import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec

P = ParamSpec("P")

TRY_AGAIN = 75
"""Exit code after a signal: saved, and the same command goes on."""


LONGEST = 1500
"""Characters of a sentence, at most; a list of all fields takes most of them."""


def one_line(text: str, most: int = LONGEST) -> str:
    """Text that a terminal shows as it is: control characters escaped, and cut in the middle to ``most`` characters."""
    if len(text) > most:  # before escaping: megabytes may have been quoted
        text = f"{text[: most // 2]} [...] {text[-most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason_of(error: BaseException, most: int = LONGEST) -> str:
    """The first line of an error's message; of an error without one its kind."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0], most)


def shown(value: Any) -> str:
    """A value as a sentence quotes it: as ``repr``, cut to some 100 characters, however large or nested it is."""
    return _QUOTES.repr(value)


class _Quotes(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 100
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 2, 3, 3, 3

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 1000:  # Python writes no more than 4,300 digits
            return f"a number of about {value.bit_length() * 3 // 10:,} digits"
        return super().repr_int(value, level)


_QUOTES = _Quotes()


class UserError(Exception):
    """Bad input: what is wrong, where, and the remedy, in one sentence of at most ``LONGEST`` characters or a little
    more; it is safe to print whatever of the input it quotes.

    Args:
        local: one rank alone met the error, so that it has to speak for itself.
    """

    exit_code = 2

    def __init__(self, sentence: str, local: bool = False) -> None:
        super().__init__(sentence)
        self.local = local

    def __str__(self) -> str:
        return one_line(super().__str__())

    def report(self) -> int:
        """Say it on standard error; the exit code of a command of one process."""
        print(f"error: {self}", file=sys.stderr)
        return self.exit_code


def reports_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Decorator of the ``main`` of a command of one process: reports a ``UserError`` and returns its exit code."""

    @functools.wraps(main)
    def reporting(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            return error.report()

    return reporting


@contextmanager
def of_one_rank() -> Iterator[None]:
    """Mark a ``UserError`` from within as that of this rank alone, so that the watchdog tells the others."""
    try:
        yield
    except UserError as error:
        error.local = True
        raise


class ConfigError(UserError):
    """The run configuration or the DeepSpeed JSON cannot work as written."""


class DataError(UserError):
    """The training data is missing, unreadable or too small."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class TrainingHalted(UserError):
    """Training cannot go on (too many bad losses in a row, a full disk)."""

    exit_code = 3

"""The errors a user can cause, each carrying one clear sentence.

The launchers print the sentence once, on rank 0, and exit with ``exit_code``; anything else that
escapes is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import sys

TRY_AGAIN = 75
"""Exit code after a signal: saved, and the same command goes on."""


class UserError(Exception):
    """Bad input: what is wrong, where, and the mend, in one sentence."""

    exit_code = 2
    local = False
    """True where one rank alone met the error, so that it has to speak for itself."""

    def report(self) -> int:
        """Say it on standard error; the exit code of a command of one process."""
        print(f"error: {self}", file=sys.stderr)
        return self.exit_code


class ConfigError(UserError):
    """The run configuration or the DeepSpeed JSON cannot work as written."""


class DataError(UserError):
    """The training data is missing, unreadable or too small."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class TrainingHalted(UserError):
    """Training cannot go on (too many bad losses in a row, a full disk)."""

    exit_code = 3

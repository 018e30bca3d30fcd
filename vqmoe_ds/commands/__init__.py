"""Commands: ``vqmoe-a-b`` is the module ``vqmoe_ds.commands.a_b``; files of ``launchers/`` and ``tools/`` call it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from vqmoe_ds.runtime.terminal import importing, run_tool

__all__ = ["DOORS", "command", "importing", "usage"]


def command(module: str, doc: str | None, cpu: bool = False) -> Callable[[], int]:
    """The ``main`` of a command of one process: it runs what was given and returns the exit code.

    Args:
        module: below ``vqmoe_ds``; it has ``build_parser(description)`` and ``main(options)``.
        doc: what the command is for, with examples, as ``usage`` takes it.
        cpu: whether DeepSpeed need not look for a GPU.
    """

    def main() -> int:
        if cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with importing():
            room = import_module(f"vqmoe_ds.{module}")
        return run_tool(lambda: room.main(room.build_parser(usage(doc)).parse_args()))

    return main


def usage(doc: str | None) -> str:
    """The docstring of a command, whose examples start it as this process was started.

    They are written for an installed package: ``vqmoe-NAME``, after ``deepspeed --no_python`` for several ranks. A file
    of a checkout, or a module (``python -m``), is shown in place of that.
    """
    started = Path(sys.argv[0])
    if started.suffix != ".py":
        return doc or ""
    if started.parent.name == "commands":
        name, alone, ranks = started.stem, "python -m ", "--module "
        target = f"{__name__}.{name}"
    else:
        name, alone, ranks = DOORS.get(started.name, started.stem), "python ", ""
        target = f"{started.resolve().parent.name}/{started.name}"
    command = f"vqmoe-{name.replace('_', '-')}"
    text = (doc or "").replace(f"--no_python {command}", ranks + target)
    return re.sub(rf"{command}(?![\w-])", alone + target, text)


DOORS = {"convert_checkpoint.py": "convert", "prepare_data.py": "prepare"}
"""Files of ``tools/`` whose command has a shorter name."""

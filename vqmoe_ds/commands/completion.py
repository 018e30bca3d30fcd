"""Print what a shell needs to complete all commands: options, choices, names of presets, fields of --set, files.

    vqmoe-completion bash > ~/.vqmoe-completion                    # zsh: the same word in place of bash
    echo '. ~/.vqmoe-completion' >> ~/.bashrc                      # ~/.zshrc: after compinit

It is of the version that printed it, so print it anew after an update.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import re
import sys
from importlib import import_module
from typing import Any, NoReturn
from unittest import mock

import vqmoe_ds.commands
from vqmoe_ds.commands import importing, usage
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.terminal import run_tool

FIELDS = "_vqmoe_fields"
"""Shell function that names the fields of ``--set``."""


class _Asked(BaseException):
    """Carries the parser of a command out of its ``main``."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def main() -> int:
    """Run the command that was given; the exit code."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU
    return run_tool(_print)


def _print() -> int:
    parser = argparse.ArgumentParser(description=usage(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args().shell
    shtab = library("shtab", "vqmoe-completion")
    with importing():
        parsers = [parser_of(name) for name in command_names() if name != "completion"]
    scripts = [_script(shtab, parser, shell, first=not number) for number, parser in enumerate(parsers)]
    print("\n".join(scripts))
    return 0


def command_names() -> list[str]:
    """Modules of this package, one per command."""
    return [module.name for module in pkgutil.iter_modules(vqmoe_ds.commands.__path__)]


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command: the first that its ``main`` asks to parse."""

    def ask(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise _Asked(parser)

    command = import_module(f"{vqmoe_ds.commands.__name__}.{name}")
    asking = mock.patch.object(argparse.ArgumentParser, "parse_args", ask)
    with asking, mock.patch.object(sys, "argv", [f"vqmoe-{name.replace('_', '-')}"]):
        try:
            command.main()
        except _Asked as asked:
            return asked.parser
    raise AssertionError(f"{name} parses no command line")


def _script(shtab: Any, parser: argparse.ArgumentParser, shell: str, first: bool) -> str:
    from vqmoe_ds.config.load import preset_names

    for action in parser._actions:
        if action.dest == "preset":
            action.choices = preset_names()
        elif action.dest == "set":
            action.complete = {shell: FIELDS}  # type: ignore[attr-defined]
        elif action.nargs != 0 and action.choices is None and action.type is None:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = str(shtab.complete(parser, shell, preamble={shell: _fields(shell)} if first else {}))
    # For zsh it is made to lie in a folder of functions, one file per command; here all commands share one.
    return re.sub(
        r"^if \[\[ \$zsh_eval_context.*?(compdef [^\n]*).*?^fi$", r"\1", script, flags=re.DOTALL | re.MULTILINE
    )


def _fields(shell: str) -> str:
    """A shell function that offers the fields of ``--set``."""
    from vqmoe_ds.config.load import field_table

    names = " ".join(f"{row.name}=" for row in field_table())
    offer = f'compgen -W "{names}" -- "$1"' if shell == "bash" else f"compadd -S '' -- {names}"
    return f"{FIELDS}() {{ {offer}; }}"


if __name__ == "__main__":
    sys.exit(main())

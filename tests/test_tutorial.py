"""docs/tutorial.md: its commands run one after the other, with few steps by default, and as they stand (slow).

docs/tutorial.ipynb is the same page, and runs without a hand on it, with few steps.
"""

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
from tests.tutorial import NOTEBOOK, PAGE, notebook, script, written

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = "requirements-dev.txt is not installed"


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
    text = re.sub(r"--train_steps \d+", "--train_steps 6", script(PAGE.read_text("utf-8")))
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
    done = subprocess.run(
        ["bash", "-euc", script(PAGE.read_text("utf-8"))], capture_output=True, text=True, cwd=checkout, env=env
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    scores = [json.loads((checkout / f"hour/{run}/summary.json").read_text()) for run in ("run", "lines")]
    assert scores[0]["validation_bits_per_byte"] < 2.4
    assert scores[1]["test_accuracy"] > 0.5


def test_the_notebook_is_the_page():
    page = PAGE.read_text("utf-8")
    assert NOTEBOOK.read_text("utf-8") == written(page), "write it anew: python -m tests.tutorial"
    cells = ["".join(cell["source"]) for cell in notebook(page)["cells"] if cell["cell_type"] == "code"][1:]
    assert "\n\n".join(cell.removeprefix("%%bash -eu\n") for cell in cells) == script(page).rstrip()


@pytest.mark.timeout(1800)
def test_the_notebook_runs_headless(checkout, monkeypatch):
    nbclient, nbformat = (pytest.importorskip(name, reason=LIBRARIES) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel", reason=LIBRARIES)
    page = re.sub(r"--train_steps \d+", "--train_steps 6", PAGE.read_text("utf-8"))
    book = nbformat.reads(written(page), as_version=4)
    nbformat.validate(book)
    for name, value in {**environment(), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    (checkout / "pages").mkdir()  # beside docs, which leads out of here
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(checkout / "pages")}}).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    said = ["".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in code]
    assert any("vq, 64 experts" in text for text in said) and any("\nThe experts" in text for text in said)
    assert said[-1].startswith("A token of the codebook")
    assert (checkout / "hour/routing/routing.html").exists() and (checkout / "hour/exported/config.json").exists()

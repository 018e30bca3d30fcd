"""The tool as its users run it: real trainings, a real kill, and the same command again."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import warm
from tests.experiments.test_grid import GRID
from tests.launchers.test_pretrain import _wait_for
from vqmoe_ds.experiments.compare import build_parser, main
from vqmoe_ds.experiments.runs import Runner, _empty

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40


@pytest.fixture
def command(tmp_path) -> list[str]:
    """Of a grid whose runs are long enough to be killed in the middle."""
    (tmp_path / "words.txt").write_text("".join(f"{i} little words make {i * i % 97} stories. " for i in range(400)))
    output = {"log_every": 1, "eval_every": 0, "save_every": 5, "probe_tokens": 32, "sample_tokens": 0}
    common = {**GRID["set"], "moe.num_experts": 4, "codebook.num_codes": 4, "train.batch_size": 4, "train.steps": STEPS}
    common |= {f"run.{name}": value for name, value in output.items()}
    grid = {**GRID, "set": common, "seeds": [1], "corpora": {"words": {"data.path": str(tmp_path / "words.txt")}}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    tool = [sys.executable, str(ROOT / "tools/compare_routers.py"), str(tmp_path / "grid.yaml")]
    return [*tool, "--out", str(tmp_path / "out")]


def _environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1"}


def test_killed_in_the_middle_the_same_command_goes_on_and_reports(command, tmp_path, capsys):
    run_dir, command = tmp_path / "out/words/top-2/seed-1", [*command, "--only", "top-2"]
    tool = warm.Popen(command, stdout=subprocess.DEVNULL, env=_environment())
    _wait_for(lambda: list(run_dir.glob("checkpoints/*/manifest.json")), tool)
    tool.kill()  # its run goes on, so it is killed too, as a machine that goes down would
    tool.wait()
    os.killpg(int((run_dir / ".lock").read_text()), signal.SIGKILL)
    with (run_dir / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits until it is gone
    assert not (run_dir / "summary.json").exists()
    same = build_parser("").parse_args(command[2:])
    assert main(same) == 0, capsys.readouterr().err
    assert "resumed from" in (run_dir / "run.log").read_text()
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps[:STEPS] == list(range(1, STEPS + 1)), "no step twice, none left out"
    finished = (run_dir / "summary.json").stat().st_mtime_ns
    assert "1 of 2 runs are finished" in (tmp_path / "out/report.md").read_text()
    assert "words | top-2 | seed 1: " in capsys.readouterr().out
    assert main(same) == 0
    assert "words | top-2 | seed 1: " not in capsys.readouterr().out, "nothing is run a second time"
    assert (run_dir / "summary.json").stat().st_mtime_ns == finished


def test_text_that_every_run_would_prepare_is_refused(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("a few little words " * 400)
    data = {"data.path": str(tmp_path / "words.txt"), "data.tokenizer": "bytes"}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**GRID, "corpora": {"words": data}}))
    assert main(build_parser("").parse_args([str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")])) == 2
    assert "would prepare" in (said := capsys.readouterr().err) and "prepare it for all of them" in said


def test_two_tools_never_work_in_one_run_folder(tmp_path):
    from vqmoe_ds.experiments.grid import read_grid, runs_of
    from vqmoe_ds.experiments.runs import jobs_of

    (tmp_path / "words.txt").write_text("a few little words " * 400)
    grid = {**GRID, "corpora": {"words": {"data.path": str(tmp_path / "words.txt")}}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    parsed = read_grid(str(tmp_path / "grid.yaml"))
    job = jobs_of(parsed, runs_of(parsed, tmp_path / "out"))[0]
    job.run.folder.mkdir(parents=True)
    said: list[str] = []
    with (job.run.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert Runner([job], 1, "", False, said.append).run() == []
    assert said == ["words | top-2 | seed 1: another process is at it"]
    assert not (job.run.folder / "run.log").exists()


def test_a_run_that_fails_is_told_by_its_last_words_and_the_others_go_on(command, tmp_path):
    prefix = ["--prefix", "sh -c 'echo error: no such luck >&2; exit 3' --"]
    result = warm.run([*command, *prefix], capture_output=True, text=True, env=_environment(), timeout=60)
    assert result.returncode == 1
    assert result.stderr.count("failed: ") == 2
    assert "words | top-2 | seed 1: exit code 3, error: no such luck (" in result.stderr
    assert "no run is finished; there is nothing to report" in result.stdout


def test_a_run_folder_is_emptied_of_links_and_not_of_what_they_lead_to(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "weights").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    _empty(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir()) and (tmp_path / "scratch" / "weights").exists()

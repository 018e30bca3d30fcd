"""Run folders that another tool or a failing disk changed while their run was queued."""

from __future__ import annotations

import errno
import json
import re
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.experiments.test_grid import compare, grid_file  # noqa: F401
from tests.experiments.test_report import _finish
from vqmoe_ds.config.load import to_yaml
from vqmoe_ds.experiments import runs
from vqmoe_ds.experiments.grid import Evaluation, read_grid, runs_of
from vqmoe_ds.experiments.runs import Job, Runner, State, check_folders, jobs_of
from vqmoe_ds.runtime.errors import ConfigError


@pytest.fixture
def job(grid_file, tmp_path) -> Job:  # noqa: F811
    grid = read_grid(grid_file())
    return jobs_of(grid, runs_of(grid, tmp_path / "out"))[0]


def _runner(jobs: list[Job], rerun_changed: bool = False) -> Runner:
    return Runner(jobs, 1, "", rerun_changed, lambda line: None)


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [
        ("nicee -n 10", "--prefix 'nicee -n 10': there is no command 'nicee'; correct its name"),
        ("nice 'x", '--prefix "nice \'x" is no command (No closing quotation); quote it as for a shell'),
    ],
)
def test_a_prefix_that_is_no_command_is_refused_before_the_first_run(prefix, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Runner([], 1, prefix, False, print)


def test_an_evaluation_of_another_shape_is_made_again(job):
    job.run.folder.mkdir(parents=True)
    job.evaluation.write_text('{"corrupted": [], "setting": []}')
    assert not job.evaluated(Evaluation(corrupt=["typo:0.1"]))
    scored = {"corrupted": [], "setting": {"stride": 16}}
    for shifted, answer in (({}, False), ({"shifted": [{"text": "plays.txt"}]}, True)):
        job.evaluation.write_text(json.dumps(scored | shifted))
        assert job.evaluated(Evaluation(shift=["plays.txt"])) is answer
    job.evaluation.write_text(json.dumps(scored))
    assert job.evaluated(Evaluation()), "one that was made before other domains could be scored stays"


@pytest.mark.parametrize("rerun", [False, True])
def test_what_another_tool_trained_meanwhile_is_thrown_away_only_where_that_was_asked_for(job, monkeypatch, rerun):
    trained: list[Job] = []
    monkeypatch.setattr(Runner, "_train_and_evaluate", lambda self, job, lock: trained.append(job) or "trained anew")
    waiting, summary = _runner([job], rerun), job.run.folder / "summary.json"
    _finish(job, 2.0, 0.1)
    other = to_yaml(job.config.run).replace("learning_rate: 0.006", "learning_rate: 0.1")
    (job.run.folder / "config.yaml").write_text(other)
    (failure,) = waiting.run()
    assert summary.exists() is not rerun and trained == ([job] if rerun else [])
    assert failure == "trained anew" if rerun else "was made with train.learning_rate=0.1, the grid says" in failure


@pytest.mark.parametrize("summary", ['{"steps": 2}', '{"steps": Infinity}', "[" * 100_000])
def test_a_run_is_finished_by_the_steps_of_the_grid_alone(job, summary):
    """One of fewer steps that is taken on to those of the grid has their configuration, and the report of its own."""
    _finish(job, 2.0, 0.1)
    assert job.finished
    (job.run.folder / "summary.json").write_text(summary)
    assert job.state() is State.UNFINISHED


def test_a_run_that_starts_needs_its_token_table_and_one_that_resumes_has_it_in_its_checkpoint(grid_file, tmp_path):  # noqa: F811
    path = tmp_path / "table.safetensors"
    grid = read_grid(grid_file(lambda g: g["set"].update({"moe.router": "token_table", "router.path": str(path)})))
    grid = grid.model_copy(update={"entries": [entry.model_copy(update={"overrides": {}}) for entry in grid.entries]})
    (job, *_) = jobs_of(grid, runs_of(grid, tmp_path / "out"))
    save_file({"token_table": torch.zeros(2, 256, dtype=torch.int64)}, path)
    check_folders([job], rerun_changed=False)
    save_file({"token_table": torch.full((2, 256), 99)}, path)
    with pytest.raises(ConfigError, match=r"^entry top-2: router\.path=.*names expert 99"):
        check_folders([job], rerun_changed=False)
    path.unlink()
    _finish(job, 2.0, 0.1)
    (job.run.folder / "summary.json").write_text('{"steps": 2}')
    with pytest.raises(ConfigError, match=r"table\.safetensors does not exist; make that table first"):
        check_folders([job], rerun_changed=False)
    tag = job.run.folder / "checkpoints/global_step0000002"
    tag.mkdir(parents=True)
    (tag / "manifest.json").write_text("{}")
    check_folders([job], rerun_changed=False)


@pytest.mark.parametrize("name", ["config.yaml", "ds_config.json"])
def test_a_run_that_cannot_be_read_now_is_never_thrown_away_and_the_others_go_on(job, tmp_path, monkeypatch, name):
    _finish(job, 2.0, 0.1)
    read, later = runs.read_small, replace(job, run=replace(job.run, folder=tmp_path / "later"))

    def fail(path: Any, *more: Any) -> bytes:
        if path == job.run.folder / name:
            raise OSError(errno.EIO, "Input/output error")
        return read(path, *more)

    monkeypatch.setattr(runs, "read_small", fail)
    monkeypatch.setattr(Runner, "_train_and_evaluate", lambda self, job, lock: f"{job.run.folder.name} ran")
    failures = _runner([job, later], rerun_changed=True).run()
    assert "cannot be read (Input/output error); fix that first" in failures[0] and failures[1:] == ["later ran"]
    assert (job.run.folder / "summary.json").exists()


def test_a_run_that_has_just_ended_keeps_no_other_from_being_stopped(monkeypatch):
    runner, stopped = _runner([]), []

    def kill(group: int, number: int) -> None:
        stopped.append((group, number))
        if len(stopped) == 1:
            raise ProcessLookupError

    monkeypatch.setattr(runs.os, "killpg", kill)
    runner._running = [SimpleNamespace(pid=1), SimpleNamespace(pid=2)]
    runner._stop()
    assert sorted(stopped) == [(1, signal.SIGTERM), (2, signal.SIGTERM)]

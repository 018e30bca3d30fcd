"""The report of runs whose numbers are known: what it says of them, and what it does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.experiments.test_grid import compare, grid_file  # noqa: F401
from vqmoe_ds.config.load import to_yaml
from vqmoe_ds.experiments.grid import read_grid, runs_of
from vqmoe_ds.experiments.runs import Job, State, jobs_of

LOSSES = {"top-2": [2.0, 2.2], "codes": [1.9, 2.1000001]}


def _finish(job: Job, loss: float, rise: float) -> None:
    """The files of a finished run."""
    folder = job.run.folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(job.config.run))
    (folder / "ds_config.json").write_text(json.dumps(job.config.deepspeed))
    summary = {"steps": 4, "validation_bits_per_byte": loss, "validation_loss": loss * 0.7}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [_row(step, loss + 1 / step) for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mean = {"bits_per_byte": loss + rise, "bits_per_byte_rise": rise}
    row = {"kind": "word_swap", "rate": 0.025, "mode": "inputs", "mean": mean, "seeds": [{}, {}, {}]}
    shifted = {"text": "plays.txt", "bits_per_byte": loss + 2 * rise, "bits_per_byte_rise": 2 * rise}
    scored = {"setting": {"stride": 16}, "corrupted": [row], "shifted": [shifted]}
    (folder / "evaluation.json").write_text(json.dumps(scored))


def _row(step: int, loss: float) -> dict[str, Any]:
    loads = {"busiest_expert": [step, 1.5], "load_variation": [0.25, 0.5], "fluctuation": [0.125, 0.0]}
    return {"step": step, "loss": loss * 0.7, "bits_per_byte": loss, "tokens_per_second": 1000.0 * step, **loads}


@pytest.fixture
def jobs(grid_file, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "plays.txt").write_text("words, words, words")
    monkeypatch.chdir(tmp_path)
    path = grid_file(lambda g: g.update(evaluate={"corrupt": ["word_swap:0.025"], "shift": ["plays.txt"]}))
    grid = read_grid(path)
    return path, jobs_of(grid, runs_of(grid, tmp_path / "out"))


def test_means_intervals_and_health_of_known_runs(jobs, tmp_path, capsys):
    path, all_jobs = jobs
    for job in all_jobs:
        name, seed = job.run.entry.name, job.run.seed
        _finish(job, LOSSES[name][seed - 1], {"top-2": 0.2, "codes": 0.1}[name] * seed)
    assert compare(path, tmp_path / "out", "--report_only") == 0
    (section,) = json.loads((tmp_path / "out/report.json").read_text())
    codes = section["entries"]["codes"]
    assert codes["losses"]["clean"] == pytest.approx({"mean": 2.0, "error": 0.1, "seeds": 2})
    clean = codes["differences"]["top-2"]["clean"]
    assert (clean["mean"], clean["verdict"]) == (pytest.approx(-0.1), "better")
    rise = codes["differences"]["top-2"]["word_swap 0.025, inputs: rise"]
    assert (rise["mean"], rise["verdict"]) == (pytest.approx(-0.15), "cannot be told")
    assert codes["losses"]["shift plays.txt"]["mean"] == pytest.approx(2.3)
    assert codes["differences"]["top-2"]["shift plays.txt: rise"]["mean"] == pytest.approx(-0.3)
    health = {name: value["mean"] for name, value in codes["health"].items()}
    wanted = {"tokens_per_second": 2500, "busiest_expert": 3.5, "load_variation": 0.5, "fluctuation": 0.125}
    assert health == wanted, "the second half of the run, the worst layer"
    text = (tmp_path / "out/report.md").read_text()
    assert "Against top-2, clean: better: codes." in text
    (undecided,) = (line for line in text.splitlines() if line.startswith("Against top-2, it cannot be told of any"))
    assert "word_swap 0.025, inputs: rise" in undecided and "clean" not in undecided
    assert "-0.1000 [-0.1000, -0.1000]" in text
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "better: codes" in page


def test_verdicts_are_corrected_for_their_number(grid_file, tmp_path):  # noqa: F811
    def more(grid: dict[str, Any]) -> None:
        grid["entries"] += [{**grid["entries"][1], "name": name} for name in ("clear", "narrow", "narrower")]

    path = grid_file(more)
    grid = read_grid(path)
    # Differences (0.1, 0.1 + s): t = (0.2 + s) / s, and p = 1 - 2 / pi atan t with one degree of freedom.
    spread = {"codes": 1e-6, "clear": 0.004, "narrow": 0.012, "narrower": 0.013}
    alone = {name: 1 - 2 / math.pi * math.atan((0.2 + s) / s) for name, s in spread.items()}
    assert alone["clear"] * 3 < 0.05 < alone["narrow"] * 2 and alone["narrower"] < 0.05
    for job in jobs_of(grid, runs_of(grid, tmp_path / "out")):
        name = job.run.entry.name
        worse = 0.0 if name == "top-2" else 0.1 + spread[name] * (job.run.seed == 2)
        _finish(job, 2.0 + worse, 0.1)
    assert compare(path, tmp_path / "out", "--report_only") == 0
    (section,) = json.loads((tmp_path / "out/report.json").read_text())
    found = {name: entry["differences"]["top-2"]["clean"] for name, entry in list(section["entries"].items())[1:]}
    assert all(difference["low"] > 0.001 for difference in found.values()), "each interval by itself leaves zero out"
    assert {name: d["p"] for name, d in found.items()} == pytest.approx(alone, abs=1e-6)
    wanted = {
        "codes": 4 * alone["codes"],
        "clear": 3 * alone["clear"],
        "narrow": 2 * alone["narrow"],
        "narrower": 2 * alone["narrow"],
    }
    assert {name: d["p_holm"] for name, d in found.items()} == pytest.approx(wanted, abs=1e-6)
    text = (tmp_path / "out/report.md").read_text()
    assert "Holm's correction at 5 % over the 4 difference(s) of this section's entries to top-2" in text
    assert "Against top-2, clean: worse: codes, clear; cannot be told: narrow, narrower." in text


def test_an_entry_of_another_budget_is_named_as_one(jobs, tmp_path):
    path, all_jobs = jobs
    for job in all_jobs:
        _finish(job, LOSSES[job.run.entry.name][job.run.seed - 1], 0.1)
    grid = yaml.safe_load(Path(path).read_text())
    grid["groups"]["codes"] = {"other_budgets": ["top-2"]}
    grid["entries"][1]["group"] = "codes"
    Path(path).write_text(yaml.safe_dump(grid))
    assert compare(path, tmp_path / "out", "--report_only") == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "| difference to top-2 (another budget) | clean |" in text
    assert "Against top-2, clean: better: codes." in text
    assert text.count("| codes |") == 3, "in tables of its own group alone"


def test_pairs_of_all_corpora_are_also_held_together(grid_file, tmp_path, capsys):  # noqa: F811
    path = grid_file(lambda g: g["corpora"].update(again={**g["corpora"]["words"], "data.holdout_every": 5}))
    grid = read_grid(path)
    better = {("words", 1): 0.1, ("words", 2): 0.3, ("again", 1): 0.1, ("again", 2): 0.3}
    for job in jobs_of(grid, runs_of(grid, tmp_path / "out")):
        gain = better[job.run.corpus, job.run.seed] if job.run.entry.name == "codes" else 0.0
        _finish(job, (2.0 if job.run.corpus == "words" else 3.0) - gain, 0.1)
    assert compare(path, tmp_path / "out", "--report_only") == 0
    text = (tmp_path / "out/report.md").read_text()
    alone, together = text.split("## again and words together")
    assert "-0.2000 [-1.4706, +1.0706]" in alone and "Against top-2, it cannot be told of any entry: clean" in alone
    # 0.2 +- 3.1824 * 0.1155 / sqrt(4), t of 3 degrees of freedom
    assert "-0.2000 [-0.3837, -0.0163]" in together and "Against top-2, clean: better: codes." in together


def test_missing_seeds_leave_no_verdict_and_missing_entries_no_row(jobs, tmp_path):
    path, all_jobs = jobs
    for job in all_jobs:
        if job.run.seed == 1 or job.run.entry.name == "top-2":
            _finish(job, LOSSES[job.run.entry.name][0], 0.1)
    compare(path, tmp_path / "out", "--report_only")
    text = (tmp_path / "out/report.md").read_text()
    assert "3 of 4 runs are finished" in text
    assert "-0.1000 (one seed)" in text
    assert "it cannot be told of any entry: clean" in text


def test_a_run_of_another_configuration_is_no_result_and_is_refused_or_thrown_away(jobs, tmp_path, capsys):
    path, all_jobs = jobs
    for job in all_jobs:
        _finish(job, 2.0, 0.1)
    job = all_jobs[-1]
    old = to_yaml(job.config.run).replace("learning_rate: 0.006", "learning_rate: 0.1")
    (job.run.folder / "config.yaml").write_text(old)
    assert [j.state() for j in all_jobs] == [State.FINISHED] * 3 + [State.CHANGED]
    assert compare(path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "run words | codes | seed 2 in" in error
    assert "was made with train.learning_rate=0.1, the grid says 0.006; --changed rerun" in error
    compare(path, tmp_path / "out", "--report_only")
    assert "3 of 4 runs are finished" in (tmp_path / "out/report.md").read_text()


def test_a_finished_run_without_its_checkpoint_cannot_be_evaluated(jobs, tmp_path, capsys):
    path, all_jobs = jobs
    for job in all_jobs:
        _finish(job, 2.0, 0.1)
    (all_jobs[0].run.folder / "evaluation.json").unlink()
    assert all_jobs[0].state() is State.TRAINED
    assert compare(path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "is to be evaluated on damaged data, but" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("change", [{"seeds": 2}, {"stride": 8}, {"corrupt": ["word_swap:0.05"]}])
def test_another_evaluation_than_the_grid_asks_for_is_none(jobs, change):
    job = jobs[1][0]
    _finish(job, 2.0, 0.1)
    assert job.state() is State.FINISHED
    assert replace(job, wanted=job.wanted.model_copy(update=change)).state() is State.TRAINED


def test_configurations_older_than_a_field_are_still_the_same(jobs):
    job = jobs[1][0]
    _finish(job, 2.0, 0.1)
    older = "\n".join(line for line in to_yaml(job.config.run).splitlines() if "z_loss_weight" not in line)
    (job.run.folder / "config.yaml").write_text(older)
    assert job.state() is State.FINISHED

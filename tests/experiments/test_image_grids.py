"""Grids of classifiers of images, from training to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.images import write_folder
from vqmoe_ds.experiments.compare import build_parser, main
from vqmoe_ds.experiments.grid import read_grid, runs_of
from vqmoe_ds.experiments.measures import damaged_images
from vqmoe_ds.experiments.runs import State, jobs_of

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    **{"model.image_size": 8, "model.patch_size": 4, "model.layers": 2, "model.width": 16, "model.heads": 2},
    **{"model.dense_hidden": 16, "moe.num_experts": 4, "moe.expert_hidden": 16, "codebook.num_codes": 4},
    **{"train.steps": 4, "train.batch_size": 4, "train.warmup_steps": 1, "run.log_every": 1, "run.eval_every": 0},
}


@pytest.fixture
def grid(tmp_path) -> dict[str, Any]:
    return {
        "preset": "vit-cifar",
        "ds_config": str(ROOT / "ds_configs/zero0.json"),
        "set": SMALL,
        "seeds": [1],
        "corpora": {"squares": {"data.path": str(write_folder(tmp_path / "squares"))}},
        "evaluate": {"corrupt": ["gaussian_noise:1", "fog:2"], "attacks": ["fgsm"], "eps": [1], "max_tokens": 64},
        "entries": [
            {"name": "top-2", "set": {"moe.router": "topk", "moe.top_k": 2}},
            {"name": "codes", "set": {"moe.router": "vq", "moe.top_k": 1}},
        ],
    }


def write(folder: Path, grid: dict[str, Any]) -> str:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return str(path)


def compare(*words: str) -> int:
    return main(build_parser("").parse_args(list(words)))


def test_images_are_trained_damaged_attacked_and_reported(grid, tmp_path, capsys):
    grid["groups"] = {"all": {"baselines": ["top-2"], "tolerance": 0.5}}
    path, out = write(tmp_path, grid), str(tmp_path / "out")
    assert compare(path, "--out", out, "--set", "train.steps=6") == 0, capsys.readouterr().err
    assert "% wrong in" in capsys.readouterr().out
    (section,) = json.loads((tmp_path / "out/report.json").read_text())
    assert (section["unit"], section["steps"]) == ("% wrong", 6), "--set overrides what the entries share"
    folder = tmp_path / "out/squares/codes/seed-1"
    scores = json.loads((folder / "evaluation.json").read_text())
    losses = {kind: value["mean"] for kind, value in section["entries"]["codes"]["losses"].items()}
    kinds = ["noise", "weather", "all damage", "fgsm 1/255"]
    assert set(losses) == {"clean", *kinds, *(f"{kind}: rise" for kind in kinds)}
    assert losses["clean"] == pytest.approx(100 * (1 - scores["clean"]["accuracy"]))
    drops = [row["drop"] for row in scores["corrupted"]]
    assert losses["all damage: rise"] == pytest.approx(100 * sum(drops) / 2, abs=1e-9)
    assert losses["fgsm 1/255: rise"] == pytest.approx(100 * scores["attacked"][0]["drop"], abs=1e-9)
    assert "difference to top-2" in (tmp_path / "out/report.md").read_text()


def test_runs_that_were_scored_in_another_way_are_scored_again(grid, tmp_path):
    parsed = read_grid(write(tmp_path, grid))
    job = jobs_of(parsed, runs_of(parsed, tmp_path / "out"))[0]
    rows = [{"kind": "gaussian_noise", "severity": 1}, {"kind": "fog", "severity": 2}]
    scored: dict[str, Any] = {"corrupted": rows, "attacked": [{"attack": "fgsm", "eps": 1.0}], "setting": {}}
    job.run.folder.mkdir(parents=True)
    scored["setting"]["max_tokens"] = 64
    fewer = {**scored, "setting": {}}
    for change, answer in ((scored, True), ({**scored, "attacked": []}, False), (fewer, False), ({}, False)):
        job.evaluation.write_text(json.dumps(change))
        assert job.wanted is not None and job.evaluated(job.wanted) is answer
    assert job.state() is State.NEW


@pytest.mark.parametrize(
    ("evaluate", "sentence"),
    [
        ({"corrupt": ["word_swap"]}, "entry top-2 of the grid, corpus squares: --corrupt 'word_swap' damages no image"),
        ({"attacks": ["deepfool"]}, "entry top-2 of the grid, corpus squares: --attacks 'deepfool' is none"),
        ({"shift": ["README.md"]}, "evaluate: shift is for text, and this model classifies images; leave it out"),
        ({"stride": 16}, "evaluate: stride is for text, and this model classifies images; leave it out"),
    ],
)
def test_damage_that_images_cannot_take_is_one_sentence(grid, tmp_path, capsys, evaluate, sentence):
    path = write(tmp_path, {**grid, "evaluate": evaluate})
    assert compare(path, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_kind_at_more_severities_weighs_no_more_than_another(tmp_path):
    found = [("fog", 3, 0.5), *(("contrast", severity, 0.9) for severity in range(1, 6))]
    rows = [{"group": "weather", "kind": kind, "severity": level, "accuracy": share} for kind, level, share in found]
    scores = {"clean": {"accuracy": 1.0}, "corrupted": rows, "attacked": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    assert damaged_images(tmp_path)["all damage"] == pytest.approx(30), "the mean of 50 and 10 % wrong"

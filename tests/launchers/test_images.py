"""Classifiers of images from the command line: trained, stopped and resumed, scored, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.checkpoint.layouts import Layout, write_one
from tests.distributed import run_ranks
from tests.images import squares, write_arrays, write_folder
from tests.launchers.test_pretrain import ROOT, _free_port, losses, run
from vqmoe_ds.checkpoint import convert, inspect
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.evaluation.images import open_split
from vqmoe_ds.evaluation.out_of_distribution import open_others
from vqmoe_ds.finetune.predict import load_classifier
from vqmoe_ds.runtime.errors import CheckpointError

EVALUATE = [sys.executable, str(ROOT / "launchers/evaluate.py")]
FINETUNE = [sys.executable, str(ROOT / "launchers/finetune.py")]
SMALL = """
model: {image_size: 8, patch_size: 2, width: 16, heads: 2, layers: 2, moe_every: 1}
moe: {num_experts: 4, expert_hidden: 16}
train: {steps: 12, batch_size: 8, warmup_steps: 2, learning_rate: 0.03}
data: {augment: crop}
run: {log_every: 1, eval_every: 4, save_every: 4, keep_last: 0, probe_tokens: 64}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with images (``images``), a text model (``text``) and the options of a run (``small.yaml``)."""
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder / "images/train", 60)
    write_folder(folder / "images/test", 15, seed=1)
    (folder / "small.yaml").write_text(SMALL)
    (folder / "text").mkdir()
    run_ranks(1, write_one, str(folder / "text"), Layout(2, 1, 1), {"model.vocab_size": 256})
    return folder


def arguments(place: Path, run_dir: Path, *more: str) -> list[str]:
    base = ["--preset", "vit-cifar", "--config", str(place / "small.yaml"), "--run_dir", str(run_dir)]
    return [*base, "--ds_config", str(ROOT / "ds_configs/zero2.json"), "--data", str(place / "images"), *more]


def refusal(arguments: list[str], launcher: list[str] | None = None) -> str:
    """The one sentence of a command that cannot work."""
    done = run(arguments, launcher)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = run(arguments(place, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir, done


def test_a_run_learns_and_reports_accuracy(finished):
    run_dir, done = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["validation_accuracy"] > 0.6
    assert summary["validation_by_class"]["left"]["images"] == 5
    assert summary["tokens"] == 12 * 8 * 16
    assert (run_dir / "confusion.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_accuracy" in row] == [4, 8, 12]
    assert "60 training and 15 held-out images of 8 x 8, 3 classes" in done.stdout
    assert f"accuracy {summary['validation_accuracy']:.2%} on all 15 held-out images" in done.stdout
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (config["data"]["classes"], config["model"]["vocab_size"]) == (["left", "middle", "right"], 3)


def test_a_stopped_run_goes_on_to_the_bit(place, finished, tmp_path):
    whole = finished[0]
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "checkpoints/global_step0000012")
    done = run(arguments(place, run_dir))
    assert done.returncode == 0, done.stderr
    assert "at step 8" in done.stdout
    assert losses(run_dir) == losses(whole)
    same = ("validation_loss", "validation_accuracy", "validation_by_class")
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (whole, run_dir))
    assert [first[name] for name in same] == [second[name] for name in same]


def test_evaluation_scores_the_test_set_again(place, finished, tmp_path):
    run_dir, _ = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    done = run([str(run_dir), "--json", str(tmp_path / "scores.json"), "--batch_size", "4"], EVALUATE)
    assert done.returncode == 0, done.stderr
    clean = json.loads((tmp_path / "scores.json").read_text())["clean"]
    assert clean["accuracy"] == summary["validation_accuracy"]
    assert clean["loss"] == pytest.approx(summary["validation_loss"], abs=1e-5)
    assert [sum(row) for row in clean["confusion"]] == [5, 5, 5]
    assert sum(clean["confusion"][c][c] for c in range(3)) == round(15 * clean["accuracy"])
    assert f"accuracy {clean['accuracy']:.2%}" in done.stdout
    named = run([str(run_dir), "--data", str(place / "images/train"), "--json", str(tmp_path / "t.json")], EVALUATE)
    assert named.returncode == 0, named.stderr
    assert json.loads((tmp_path / "t.json").read_text())["clean"]["images"] == 60


def test_damaged_and_attacked_images_are_scored_beside_the_clean_ones(finished, tmp_path):
    damage = ["--corrupt", "contrast:5", "--corrupt", "shot_noise", "--max_tokens", str(9 * 16)]
    damage += ["--attacks", "fgsm", "pgd20", "fgsm", "--eps", "4", "8", "4.0"]
    done = run([str(finished[0]), *damage, "--json", str(tmp_path / "scores.json")], EVALUATE)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scores.json").read_text())
    rows = found["corrupted"]
    assert [(row["kind"], row["severity"]) for row in rows] == [
        ("contrast", 5),
        *(("shot_noise", s) for s in range(1, 6)),
    ]
    assert found["clean"]["images"] == 9
    attacked = found["attacked"]
    assert [(row["attack"], row["eps"]) for row in attacked] == [("fgsm", 4), ("fgsm", 8), ("pgd20", 4), ("pgd20", 8)]
    assert found["clean"]["loss"] < attacked[0]["loss"] < attacked[1]["loss"]
    assert f"pgd20, 8/255: accuracy {attacked[3]['accuracy']:.2%}, drop {attacked[3]['drop']:.2%}" in done.stdout
    for row in rows + attacked:
        assert row["drop"] == pytest.approx(found["clean"]["accuracy"] - row["accuracy"])
    mean = sum(row["drop"] for row in rows[1:]) / 5
    assert f"mean drop {mean:.2%}" in next(line for line in done.stdout.splitlines() if line.startswith("noise"))
    both = (rows[0]["drop"] + mean) / 2
    assert next(line for line in done.stdout.splitlines() if line.startswith("all kinds")).endswith(f"{both:.2%}")


def test_published_damage_is_scored_relative_to_another_model(place, finished, tmp_path):
    run_dir, published = str(finished[0]), tmp_path / "published"
    images, labels = squares(75, seed=1)
    write_arrays(published, {"fog": images, "spatter": 255 - images}, labels)
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    damaged = [run_dir, "--data", str(published)]
    done = run([*damaged, "--json", str(first)], EVALUATE)
    assert done.returncode == 0, done.stderr
    found = json.loads(first.read_text())
    assert found["clean"]["images"] == 15 and found["setting"]["damage"] == "published"
    assert [(row["kind"], row["severity"]) for row in found["corrupted"]] == [
        (kind, severity) for kind in ("fog", "spatter") for severity in range(1, 6)
    ]
    fog, spatter = (found["corrupted"][n : n + 5] for n in (0, 5))
    assert fog[0]["accuracy"] == found["clean"]["accuracy"]  # the same images; the model looks for what is bright
    assert sum(row["accuracy"] for row in spatter) < 0.7 * sum(row["accuracy"] for row in fog)
    mean = sum(row["drop"] for row in fog) / 5
    assert any(line.startswith("all but extra") and line.endswith(f"{mean:.2%}") for line in done.stdout.splitlines())
    for row in found["corrupted"]:
        row["accuracy"] = (1 + row["accuracy"]) / 2  # half the errors
    first.write_text(json.dumps(found))
    done = run([*damaged, "--relative_to", str(first), "--json", str(second)], EVALUATE)
    assert done.returncode == 0, done.stderr
    relative = json.loads(second.read_text())["relative"]
    assert relative["ce"]["spatter"] == pytest.approx(200) and "mCE 200.0, " in done.stdout
    beside = [run_dir, "--data", str(place / "images/train"), str(published), "--max_tokens", str(6 * 16)]
    few = run([*beside, "--json", str(second)], EVALUATE)
    assert few.returncode == 0, few.stderr
    found = json.loads(second.read_text())
    assert (found["clean"]["images"], len(found["corrupted"])) == (6, 10) and "images/train" in few.stdout
    assert "leave out --corrupt and --corruptions" in refusal([*damaged, "--corruptions", "all"], EVALUATE)
    assert "add --corruptions all" in refusal([run_dir, "--relative_to", str(first)], EVALUATE)
    mixed = [run_dir, "--relative_to", str(first), "--corrupt", "fog"]
    assert "is of 15 images and published damage, and this is of 15 and damage made here" in refusal(mixed, EVALUATE)


def test_other_images_are_told_apart_by_the_models_logits(finished, tmp_path):
    told = ["--ood", "noise", "--json", str(tmp_path / "scores.json")]
    done = run([str(finished[0]), *told], EVALUATE)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "scores.json").read_text())["out_of_distribution"]
    assert (row["images"], row["count"]) == ("noise", 15)
    loaded = load_model(finished[0], images=True)
    sets = open_split(loaded, None, "auto")[0], open_others(loaded, "noise", 15).images
    logits = [loaded.model(torch.from_numpy(each.read(np.arange(15)).inputs_BS))[0].double() for each in sets]
    for name, sure in (("probability", lambda x: x.softmax(-1).amax(-1)), ("energy", lambda x: x.exp().sum(-1).log())):
        known, unknown = map(sure, logits)
        share = (known[:, None] > unknown).double().mean().item()
        assert row[name]["auroc"] == pytest.approx(share, abs=1e-9), name
        assert f"by {name} AUROC {share:.2%}" in done.stdout


def test_text_and_images_are_not_taken_for_each_other(place, finished, tmp_path):
    images, run_dir = str(place / "images"), str(finished[0])
    text_tag = str(place / "text")
    assert "is of a model of text, and this run trains one of images" in refusal(
        arguments(place, tmp_path / "a", "--resume", text_tag)
    )
    assert "is a model of text; give text" in refusal([text_tag, "--data", images], EVALUATE)
    (tmp_path / "words.txt").write_text("some words " * 50)
    assert "holds no labelled images" in refusal([run_dir, "--data", str(tmp_path / "words.txt")], EVALUATE)
    assert "--corrupt 'word_drop' damages no image" in refusal([run_dir, "--corrupt", "word_drop"], EVALUATE)
    assert "fog" in refusal([text_tag, "--data", str(tmp_path / "words.txt"), "--corrupt", "fog"], EVALUATE)
    assert "--attacks are for classifiers of images" in refusal([text_tag, "--attacks", "fgsm"], EVALUATE)
    assert "--ood are for classifiers of images" in refusal([text_tag, "--ood", "noise"], EVALUATE)
    assert "--attacks 'cw' is none; choose among fgsm" in refusal([run_dir, "--attacks", "cw"], EVALUATE)
    assert "--stride is for text" in refusal([run_dir, "--stride", "8"], EVALUATE)
    tuned = ["--checkpoint", run_dir, "--task", "sst2", "--run_dir", str(tmp_path / "b")]
    assert "fine-tuning needs a model of text" in refusal(tuned, FINETUNE)


def test_broken_images_end_a_training_before_it_starts(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    bad = tmp_path / "images/train/right/0002.png"
    bad.write_bytes(bad.read_bytes()[:50])
    moved = [
        str(tmp_path / "images") if word == str(place / "images") else word for word in arguments(place, tmp_path / "c")
    ]
    assert "1 of 60 images cannot be used" in refusal(moved) and not list((tmp_path / "c").rglob("*.npy"))
    larger = refusal([*arguments(place, tmp_path / "d"), "--set", "model.image_size=16"])
    assert "it is 8 x 8 pixels, and model.image_size=16" in larger
    shutil.rmtree(tmp_path / "images/train/right")
    shutil.rmtree(tmp_path / "images/train/middle")
    assert "all of one class (left)" in refusal(moved)


def test_a_checkpoint_of_images_is_inspected_and_moved_but_not_exported(finished, tmp_path):
    run_dir = str(finished[0])

    def converted(kind: str) -> int:
        words = [run_dir, str(tmp_path / kind), "--to", kind]
        return convert.main(convert.build_parser("").parse_args(words))

    with pytest.raises(CheckpointError, match="classifying texts needs a model of text, and .* classifies images"):
        load_classifier(run_dir)
    assert inspect.inspect(run_dir)["model"] == "a classifier of images in 3 classes (left, middle, right)"
    assert converted("portable") == 0
    assert [converted(kind) for kind in ("hf", "megatron", "native")] == [2, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["portable"]
    done = run([str(tmp_path / "portable")], EVALUATE)
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert f"accuracy {summary['validation_accuracy']:.2%}" in done.stdout, done.stderr


def test_two_ranks_score_published_damage_and_other_images_as_one_does(finished, tmp_path):
    images, labels = squares(75, seed=1)
    published = write_arrays(tmp_path / "published", {"fog": images, "contrast": images // 2}, labels)
    told = [str(finished[0]), "--data", str(published), "--ood", "noise", "--batch_size", "4"]
    ranks = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(_free_port())]
    found = []
    for launcher, more in ((EVALUATE, []), ([*ranks, EVALUATE[1]], ["--ep_size", "2"])):
        done = run([*told, *more, "--json", str(tmp_path / "scores.json")], launcher)
        assert done.returncode == 0, done.stderr
        scores = json.loads((tmp_path / "scores.json").read_text())
        found.append([scores[name] for name in ("corrupted", "out_of_distribution")])
    (one, one_other), (two, two_other) = found
    assert len(one) == len(two) == 10
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, abs=1e-5)
    for name in ("probability", "energy"):
        assert one_other[0][name] == pytest.approx(two_other[0][name], abs=1e-5)

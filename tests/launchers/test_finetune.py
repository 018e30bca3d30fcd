"""The fine-tuning launcher as its users run it: real processes, real kills."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import warm
from tests.checkpoint.layouts import Layout, write_one
from tests.distributed import run_ranks
from tests.launchers.test_pretrain import ROOT, _free_port, _wait_for, environment, run
from vqmoe_ds.checkpoint import convert, inspect
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.finetune import predict
from vqmoe_ds.runtime.errors import CheckpointError

LAUNCHER = [sys.executable, str(ROOT / "launchers/finetune.py")]
FAST = ["--set", "run.log_every=2", "--set", "run.probe_tokens=64", "--set", "train.learning_rate=0.01"]
BATCH = ["--set", "train.batch_size=8"]
GOOD, BAD = ["fine", "great", "lovely", "warm"], ["poor", "awful", "cold", "dull"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a pretrained model (``pre``) and a labelled set (``set``)."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "pre").mkdir()
    run_ranks(1, write_one, str(folder / "pre"), Layout(2, 1, 1), {"model.vocab_size": 256})
    (folder / "set").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("dev", 16), ("test", 20)):
        with (folder / "set" / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for n in range(count):
                words = rng.choice(GOOD if n % 2 else BAD, rng.integers(1, 8))
                writer.writerow([" ".join(words), "good" if n % 2 else "bad"])
    return folder


def arguments(place: Path, run_dir: Path, *more: str) -> list[str]:
    base = ["--checkpoint", str(place / "pre"), "--task", f"mood={place / 'set'}", "--run_dir", str(run_dir)]
    return [*base, *FAST, *BATCH, "--train_steps", "24", "--set", "run.eval_every=6", *more]


def result_of(run_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return {k: v for k, v in summary.items() if k not in ("seconds", "tokens_per_second", "checkpoint")}


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = run(arguments(place, run_dir), LAUNCHER, cold=True)
    assert result.returncode == 0, result.stderr
    return run_dir, result


def test_the_run_folder_holds_what_the_docs_promise(finished):
    run_dir, result = finished
    promised = "summary.json predictions.csv confusion.png loss.png usage.png config.yaml metrics.jsonl checkpoints"
    assert set(promised.split()) <= {path.name for path in run_dir.iterdir()}
    summary = result_of(run_dir)
    assert summary["texts"] == {"train": 64, "validation": 16, "test": 20}
    assert summary["finetune"]["classes"] == ["bad", "good"]
    assert summary["test_by_class"]["good"]["texts"] == 10
    assert [row["step"] for row in summary["validations"]] == [0, 6, 12, 18, 24]
    assert summary["validations"][-1]["validation_loss"] < summary["validations"][0]["validation_loss"]
    assert summary["parameters"]["learning"] < summary["parameters"]["stored"]
    assert summary["truncated"]["train"] > 0
    assert "discrete path alone" in result.stdout
    assert "are longer than the context" in result.stdout
    assert "% of the positions are padding" in result.stdout
    assert result.stderr == ""
    assert not any(word in result.stdout for word in ("WARNING", "Traceback", "Warning"))


def test_killed_in_the_middle_it_comes_to_the_same_summary(place, finished, tmp_path):
    run_dir = tmp_path / "run"
    process = warm.Popen([*LAUNCHER, *arguments(place, run_dir)], stdout=subprocess.DEVNULL, env=environment())
    _wait_for(lambda: list((run_dir / "checkpoints").glob("global_step*/manifest.json")), process)
    process.kill()
    process.wait()
    result = run(arguments(place, run_dir), LAUNCHER)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    assert result_of(run_dir) == result_of(finished[0])


@pytest.mark.slow
def test_a_finished_run_is_skipped_and_another_task_does_not_take_its_folder(place, finished):
    run_dir = finished[0]
    again = run(arguments(place, run_dir), LAUNCHER)
    assert again.returncode == 0, again.stderr
    assert "is finished already" in again.stdout
    other = run(arguments(place, run_dir, "--set", "finetune.pool=last"), LAUNCHER)
    assert other.returncode == 2
    assert "holds another fine-tuning: finetune.pool=mean there, last here" in other.stderr


def test_a_classifier_opens_in_the_inspector_and_is_refused_as_a_language_model(finished, tmp_path, capsys):
    path = str(finished[0])
    assert inspect.main(inspect.build_parser("").parse_args([path])) == 0
    assert "a classifier of 2 classes (bad, good)" in capsys.readouterr().out
    assert convert.main(convert.build_parser("").parse_args([path, str(tmp_path / "out"), "--to", "megatron"])) == 2
    sentence = capsys.readouterr().err
    assert "--to megatron needs a language model" in sentence
    assert "is a classifier of 2 classes (bad, good)" in sentence
    assert convert.main(convert.build_parser("").parse_args([path, str(tmp_path / "out"), "--to", "deepspeed"])) == 2
    assert "is of a fine-tuning that froze" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert.main(convert.build_parser("").parse_args([path, str(tmp_path / "out"), "--to", "hf"])) == 0
    assert "VQMoEForSequenceClassification" in (tmp_path / "out/config.json").read_text(encoding="utf-8")
    with pytest.raises(CheckpointError, match="is a classifier of 2 classes"):
        load_model(path)


def test_new_texts_get_the_predictions_of_the_best_checkpoint(place, finished, tmp_path, capsys):
    run_dir, file = finished[0], tmp_path / "texts.jsonl"
    with (run_dir / "predictions.csv").open(newline="") as stream:
        tested = list(csv.DictReader(stream))
    file.write_text("".join(json.dumps({"review": row["text"]}) + "\n\n" for row in tested))

    def classify(*options: str) -> int:
        return predict.main(predict.build_parser("").parse_args(list(options)))

    assert classify(str(run_dir), "--file", str(file), "--text_key", "review") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["text"], row["label"]) for row in found] == [(row["text"], row["prediction"]) for row in tested]
    sure = [float(row["probability"]) for row in tested]
    assert [row["probability"] for row in found] == pytest.approx(sure, abs=2e-4)
    for options, sentence in (
        ([str(run_dir), "--file", str(file)], "line 1: no JSON object with the key 'text'"),
        ([str(run_dir), "--text", "fine", " "], "--text 2 holds no text"),
        ([str(place / "pre"), "--text", "fine"], "is a language model"),
    ):
        assert classify(*options) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_stops_it_and_two_ranks_go_on_from_there_to_the_same_result(place, finished, tmp_path):
    run_dir = tmp_path / "run"
    process = warm.Popen([*LAUNCHER, *arguments(place, run_dir)], stdout=subprocess.DEVNULL, env=environment())
    _wait_for(lambda: list((run_dir / "checkpoints").glob("global_step*/manifest.json")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--num_gpus", "2"]
    launcher = [*deepspeed, "--master_port", str(_free_port()), LAUNCHER[1]]
    more = ["--ep_size", "2", "--ds_config", str(ROOT / "ds_configs/zero3.json")]
    result = run(arguments(place, run_dir, *more), launcher)
    assert result.returncode == 0, result.stderr
    ours, theirs = result_of(run_dir), result_of(finished[0])
    assert ours["test_accuracy"] == theirs["test_accuracy"]
    assert ours["test_loss"] == pytest.approx(theirs["test_loss"], abs=1e-4)


@pytest.mark.slow
def test_seeds_and_shots_come_to_one_table_and_finished_ones_are_skipped(place, tmp_path):
    run_dir = tmp_path / "run"
    base = ["--checkpoint", str(place / "pre"), "--task", f"mood={place / 'set'}", "--run_dir", str(run_dir)]
    command = [*base, *FAST, "--train_steps", "6", "--seeds", "2", "--shots", "1,4"]
    result = run(command, LAUNCHER)
    assert result.returncode == 0, result.stderr
    rows = json.loads((run_dir / "summary.json").read_text())["rows"]
    assert [(row["shots"], row["test_accuracy"]["seeds"]) for row in rows] == [(1, 2), (4, 2)]
    assert (run_dir / "shots.png").exists()
    (run_dir / "shots-4/seed-2/summary.json").unlink()
    again = run(command, LAUNCHER)
    assert again.stdout.count("is finished already") == 3
    assert (run_dir / "shots-4/seed-2/summary.json").exists()


@pytest.mark.slow
def test_a_language_model_is_adapted_and_stays_an_ordinary_checkpoint(place, tmp_path):
    run_dir, text = tmp_path / "run", tmp_path / "other.txt"
    text.write_text("".join(f"{i} other words, {i * i} of them; " for i in range(900)))
    base = ["--checkpoint", str(place / "pre"), "--task", "lm", "--data", str(text), "--run_dir", str(run_dir)]
    result = run([*base, *FAST, *BATCH, "--train_steps", "20", "--set", "run.eval_every=5"], LAUNCHER)
    assert result.returncode == 0, result.stderr
    summary = result_of(run_dir)
    losses = [row["validation_loss"] for row in summary["validations"]]
    assert [row["step"] for row in summary["validations"]] == [0, 5, 10, 15, 20]
    assert losses[-1] < losses[0]
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--num_gpus", "2"]
    launcher = [*deepspeed, "--master_port", str(_free_port()), LAUNCHER[1]]
    base[-1], shared = str(tmp_path / "shared"), ["--sp_size", "2"]
    result = run([*base, *FAST, *BATCH, "--train_steps", "20", "--set", "run.eval_every=5", *shared], launcher)
    assert result.returncode == 0 and "SP 2" in result.stdout, result.stderr
    again = [row["validation_loss"] for row in result_of(tmp_path / "shared")["validations"]]
    assert again == pytest.approx(losses, abs=1e-5)
    scored = run([str(run_dir), "--data", str(text)], [sys.executable, str(ROOT / "launchers/evaluate.py")])
    assert scored.returncode == 0, scored.stderr


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--checkpoint": None}, "--checkpoint is missing"),
        ({"--checkpoint": "nowhere"}, "checkpoint nowhere does not exist"),
        ({"--task": None}, "--task is missing"),
        ({"--task": "lm"}, "--task lm needs --data"),
        ({"--seeds": "0"}, "--seeds 0 is too small"),
        ({"--shots": "1,x"}, "--shots 1,x is not of the form"),
        ({"--shots": "1", "--resume": "somewhere"}, "--resume PATH names one run"),
    ],
)
def test_bad_options_are_answered_at_once_with_one_sentence(tmp_path, changes, sentence):
    options = {"--checkpoint": str(tmp_path), "--task": "sst2", **changes}
    result = run([part for name, value in options.items() if value for part in (name, value)], LAUNCHER)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1

"""Scores by hand, splits of a task, and the report over seeds and shots."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from tests.data.test_labelled_batches import texts_of
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.tokenizers import ByteTokenizer
from vqmoe_ds.finetune.classification import ClassScore, judge, open_texts, plot_confusion, write_predictions
from vqmoe_ds.finetune.report import write_report
from vqmoe_ds.runtime.errors import DataError

CLASSES = ["no", "maybe", "yes"]
# no: 4 texts, 3 found and 1 taken for yes; maybe: 2 texts, both taken for no; yes: 2 found.
HAND = ClassScore(0.5, np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 2, 0, 0, 2, 2]), np.full(8, 0.75))


def test_scores_are_those_worked_out_by_hand():
    found = judge(HAND, CLASSES)
    assert found["accuracy"] == 5 / 8
    assert found["by_class"]["no"] == {"precision": 0.6, "recall": 0.75, "f1": 0.6667, "texts": 4}
    assert found["by_class"]["maybe"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "texts": 2}
    assert found["by_class"]["yes"] == {"precision": 0.6667, "recall": 1.0, "f1": 0.8, "texts": 2}
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0 + 0.8) / 3)
    assert judge(HAND, [*CLASSES, "never"])["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 4)


def test_predictions_and_the_confusion_matrix_are_written(tmp_path):
    texts = texts_of(8, classes=3)
    write_predictions(tmp_path / "predictions.csv", texts, HAND)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert rows[3] == {"label": "class 0", "prediction": "class 2", "probability": "0.7500", "text": "3"}
    for count in (3, 40):
        plot_confusion(tmp_path / "confusion.png", HAND, [f"${c}_$" for c in range(count)])  # no formula
        assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def _write(folder, split: str, rows: list[tuple[str, str]]) -> None:
    with (folder / f"{split}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def test_splits_that_a_task_lacks_are_held_out_by_the_seed(tmp_path):
    rows = [(f"text number {n}", "ab"[n % 2]) for n in range(40)]
    _write(tmp_path, "train", rows)
    _write(tmp_path, "test", rows[:6])
    overrides = {"finetune.task": f"mine={tmp_path}", "finetune.shots": 3}
    runs = [load_config("tiny", None, {**overrides, "train.seed": seed}).config for seed in (1, 2)]
    texts = open_texts(runs[0].finetune, ByteTokenizer(), 8)
    first, second = (texts.splits(run) for run in runs)
    assert (len(first.train), len(first.validation), len(first.test)) == (6, 4, 6)
    assert first.test.texts == second.test.texts
    assert first.validation.texts != second.validation.texts
    assert not set(first.train.texts) & set(first.validation.texts)
    assert "46 texts are longer than the context: their first 8 tokens count" in "".join(
        texts.describe(runs[0].model_copy(update={"model": runs[0].model.model_copy(update={"sequence_length": 8})}))
    )
    one_file = runs[0].model_copy(
        update={"finetune": runs[0].finetune.model_copy(update={"task": str(tmp_path / "train.csv"), "shots": 0})}
    )
    splits = open_texts(one_file.finetune, ByteTokenizer(), 8).splits(one_file)
    found = [*splits.train.texts, *splits.validation.texts, *splits.test.texts]
    assert sorted(found) == sorted(text for text, _ in rows)


def test_labels_that_training_lacks_are_refused_or_counted(tmp_path):
    _write(tmp_path, "train", [("good", "a"), ("bad", "b")])
    _write(tmp_path, "test", [("good", "a"), ("new", "c"), ("", "a")])
    config = load_config("tiny", None, {"finetune.task": str(tmp_path)}).config.finetune
    with pytest.raises(DataError, match="label never seen in training: 'c'"):
        open_texts(config, ByteTokenizer(), 8)
    texts = open_texts(config.model_copy(update={"skip_bad_rows": True}), ByteTokenizer(), 8)
    assert texts.skipped == {"test": {"label never seen in training": 1, "empty text": 1}}


def test_several_runs_come_to_a_table_of_means_and_errors(tmp_path):
    names = []
    for shots in (1, 4):
        for seed, accuracy in enumerate((0.5, 0.6, 0.7), 1):
            names.append(f"shots-{shots}/seed-{seed}")
            (tmp_path / names[-1]).mkdir(parents=True)
            summary = {"seed": seed, "finetune": {"shots": shots}, "test_accuracy": accuracy + shots / 100}
            facts = {"task": "x", "router": "vq", "parameters": {}, "layout": {}, "best_step": 10 * seed}
            (tmp_path / names[-1] / "summary.json").write_text(json.dumps({**summary, **facts}))
    lines = write_report(tmp_path, names)
    assert lines[0] == "| texts a class | seeds | test accuracy | best step |"
    assert lines[2] == "| 1 | 3 | 61.00% ± 5.77% | 20 ± 6 |"
    assert (tmp_path / "table.md").read_text().splitlines() == lines
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert rows[1]["shots"] == 4
    assert rows[1]["test_accuracy"]["mean"] == pytest.approx(0.64)
    assert (tmp_path / "shots.png").exists()

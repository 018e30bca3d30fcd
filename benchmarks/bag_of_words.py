#!/usr/bin/env python
"""A bag of words on labelled texts: the baseline that tells what a fine-tuned model's figures are worth.

    python benchmarks/bag_of_words.py --task sst2=data/sst2 banking77=data/banking77
    python benchmarks/bag_of_words.py --task sst2=data/sst2 --shots 1,4,16,64,all --seeds 3 --json figures.json

Words and pairs of words, weighed by TF-IDF (1 + log counts), under a logistic regression (scikit-learn). Its C is the
best of 1, 10 and 100 by 5-fold cross-validation on the training texts, or 10 where a class has fewer than 5 of them.
Test texts are seen once, at the end. With --shots N and the seeds 1 to --seeds the training texts are those that
launchers/finetune.py draws: N of every class, none of them held out; a class with fewer is refused. The whole training
set gives one figure, as nothing is drawn, and none of it is held out for validation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from measuring import table, write_json
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from vqmoe_ds.config.schema import FinetuneConfig, RunConfig, TrainConfig
from vqmoe_ds.data.labelled_batches import LabelledTexts
from vqmoe_ds.data.tokenizers import ByteTokenizer
from vqmoe_ds.evaluation.statistics import mean_of
from vqmoe_ds.finetune.classification import TaskTexts, open_texts
from vqmoe_ds.runtime.errors import ConfigError, reports_errors

FOLDS, CHOICES, FIXED = 5, (1.0, 10.0, 100.0), 10.0
ALL = "all"


class Draw(NamedTuple):
    """Texts to learn from, and texts to classify."""

    task: str
    shots: int | None
    """Texts per class; None for all."""
    seed: int
    train: LabelledTexts
    test: LabelledTexts


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    shots = _shots(options.shots, options.seeds)
    tasks = [open_texts(FinetuneConfig(task=spec), ByteTokenizer(), sequence_length=1) for spec in options.task]
    drawn = [draw(task, n, s + 1) for task in tasks for n in shots for s in range(options.seeds if n else 1)]
    rows = [measure(one) for one in drawn]
    print(report(rows))
    write_json(options.json, rows)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", required=True, help="sst2, sst5, imdb, banking77, NAME=PATH or a path")
    parser.add_argument("--shots", default=ALL, help="texts of a class, several by commas; all: every one (default)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of every number of shots (default 3)")
    parser.add_argument("--json", help="write the figures to a file")
    return parser.parse_args(argv)


def _shots(text: str, seeds: int) -> list[int | None]:
    """Texts per class; None for all."""
    counts = [None if part == ALL else int(part) if part.isdigit() else 0 for part in text.split(",")]
    if 0 in counts or seeds < 1:
        raise ConfigError(f"--shots {text} --seeds {seeds} must be numbers from 1 on, or --shots all")
    return counts


def draw(task: TaskTexts, shots: int | None, seed: int) -> Draw:
    """The texts of one figure.

    Raises:
        ConfigError: a class has fewer texts than that.
    """
    splits = task.splits(RunConfig(train=TrainConfig(seed=seed), finetune=FinetuneConfig(shots=shots or 0)))
    train = splits.train if shots or task.test is None else task.train
    return Draw(task.name, shots, seed, train, splits.test)


def measure(drawn: Draw) -> dict[str, Any]:
    """One row of figures."""
    started, (task, shots, seed, train, test) = time.perf_counter(), drawn
    predicted, c = classify(train.texts, train.labels, test.texts)
    row = {
        "task": task,
        "shots": shots or ALL,
        "seed": seed,
        "texts": len(train),
        "C": c,
        "accuracy": float(accuracy_score(test.labels, predicted)),
        "macro_f1": float(f1_score(test.labels, predicted, average="macro", zero_division=0)),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def classify(texts: Sequence[str], labels: np.ndarray, asked: Sequence[str]) -> tuple[np.ndarray, float]:
    """Predicted classes of the texts to classify, and the C that was chosen."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    features = words.fit_transform(texts)
    regression = LogisticRegression(C=FIXED, max_iter=2000)
    if int(np.min(np.unique(labels, return_counts=True)[1])) >= FOLDS:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        search = GridSearchCV(regression, {"C": CHOICES}, cv=folds).fit(features, labels)
        regression = search.best_estimator_
    else:
        regression.fit(features, labels)
    return regression.predict(words.transform(asked)), float(regression.C)


def report(rows: list[dict[str, Any]]) -> str:
    """Means over the draws with their standard errors, in percent."""
    lines = []
    for task, shots in dict.fromkeys((row["task"], row["shots"]) for row in rows):
        group = [row for row in rows if (row["task"], row["shots"]) == (task, shots)]
        counts = f"{group[0]['texts']:,}"
        cs = ", ".join(f"{c:g}" for c in sorted({row["C"] for row in group}))
        figures = [mean_of([100 * row[key] for row in group]).show(".2f") for key in ("accuracy", "macro_f1")]
        lines.append([task, str(shots), counts, *figures, cs])
    return table(["task", "shots", "texts", "accuracy %", "macro-F1 %", "C"], lines)


if __name__ == "__main__":
    sys.exit(main())

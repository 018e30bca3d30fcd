#!/usr/bin/env python
"""What a bag of words reaches on labelled texts, so that a reader knows what a fine-tuned model's figures are worth.

    python benchmarks/bag_of_words.py --task sst2=data/sst2 banking77=data/banking77
    python benchmarks/bag_of_words.py --task sst2=data/sst2 --shots 1,4,16,64,all --seeds 3 --json figures.json

Words and pairs of words, weighed by TF-IDF (1 + log counts), under a logistic regression (scikit-learn). Its C is the
best of 1, 10 and 100 by 5-fold cross-validation on the training texts, or 10 where a class has fewer than 5 of them.
Test texts are seen once, at the end. With --shots N the training set is N texts of every class (all of a class that has
fewer), drawn anew for each seed; the whole training set gives one figure, as nothing is drawn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from measuring import table, write_json
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from vqmoe_ds.data.labelled import LabelledSet, open_labelled
from vqmoe_ds.errors import ConfigError, UserError
from vqmoe_ds.evaluation.evaluate import standard_error

FOLDS, CHOICES, FIXED = 5, (1.0, 10.0, 100.0), 10.0
ALL = "all"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    try:
        shots = _shots(options.shots, options.seeds)
        pairs = [(open_labelled(task), open_labelled(task, "test")) for task in options.task]
        rows = [row for pair in pairs for count in shots for row in measure(*pair, count, options.seeds)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
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
    """Texts a class; None for all."""
    counts = [None if part == ALL else int(part) if part.isdigit() else 0 for part in text.split(",")]
    if 0 in counts or seeds < 1:
        raise ConfigError(f"--shots {text} --seeds {seeds} must be numbers from 1 on, or --shots all")
    return counts


def measure(train: LabelledSet, test: LabelledSet, shots: int | None, seeds: int) -> list[dict[str, Any]]:
    """A row for every draw."""
    rows = []
    for seed in range(seeds if shots is not None else 1):
        started = time.perf_counter()
        chosen = np.arange(len(train)) if shots is None else draw(train.labels, shots, seed)
        texts, labels = [train.texts[i] for i in chosen], train.labels[chosen]
        predicted, c = classify(texts, labels, test.texts)
        rows.append(
            {
                **{"task": train.name, "shots": shots or ALL, "seed": seed, "texts": len(texts), "C": c},
                "accuracy": float(accuracy_score(test.labels, predicted)),
                "macro_f1": float(f1_score(test.labels, predicted, average="macro", zero_division=0)),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def draw(labels_N: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of ``shots`` texts of every class, or of all that a class has."""
    order = np.random.default_rng(seed).permutation(len(labels_N))
    return np.concatenate([order[labels_N[order] == label][:shots] for label in np.unique(labels_N)])


def classify(texts: Sequence[str], labels: np.ndarray, asked: Sequence[str]) -> tuple[np.ndarray, float]:
    """Predicted classes of the texts asked for, and the C taken."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    features = words.fit_transform(texts)
    regression = LogisticRegression(C=FIXED, max_iter=2000)
    if np.unique(labels, return_counts=True)[1].min() >= FOLDS:
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
        figures = [_cell([row[key] for row in group]) for key in ("accuracy", "macro_f1")]
        lines.append([task, str(shots), counts, *figures, cs])
    return table(["task", "shots", "texts", "accuracy %", "macro-F1 %", "C"], lines)


def _cell(shares: Sequence[float]) -> str:
    error = standard_error(shares)
    return f"{100 * np.mean(shares):.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuning on labelled texts: the splits of a task, their scores, and the report of one run.

Legend: T texts, C classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqmoe_ds.config.load import LoadedConfig
from vqmoe_ds.config.schema import FinetuneConfig, RunConfig
from vqmoe_ds.data.fingerprint import of_labelled
from vqmoe_ds.data.labelled import LabelledSet, Split, has_split, open_labelled
from vqmoe_ds.data.labelled_batches import (
    LabelledBatches,
    LabelledTexts,
    draw_shots,
    encode_texts,
    hold_out,
    rare_classes,
)
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.evaluation.plots import NoPictures, pyplot, save
from vqmoe_ds.evaluation.routing import RoutingHealth
from vqmoe_ds.finetune.callbacks import BestReport
from vqmoe_ds.finetune.config import classifier_config
from vqmoe_ds.models.session import Session
from vqmoe_ds.runtime.errors import one_line
from vqmoe_ds.runtime.files import write_atomically
from vqmoe_ds.train.callbacks import MetricsFile, Validation
from vqmoe_ds.train.job import Job
from vqmoe_ds.train.loop import Callback

LEAST_ROWS = 32
"""Texts of a forward pass in scoring, at least: without gradients there is room for more than in training."""
LONGEST_NAME = 50
"""Characters of a class that the confusion matrix shows."""


@dataclass(frozen=True)
class Splits:
    """Texts of one run: for training, for validation (which chooses the checkpoint) and for the test."""

    train: LabelledTexts
    validation: LabelledTexts
    test: LabelledTexts


@dataclass(frozen=True)
class TaskTexts:
    """All texts of a task, encoded; a split that it does not have is held out of the training texts, run by run."""

    name: str
    train: LabelledTexts
    validation: LabelledTexts | None
    test: LabelledTexts | None
    skipped: dict[str, dict[str, int]]
    """Number of rows left out, by split and reason."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def splits(self, run: RunConfig) -> Splits:
        """The splits of a run: held out and drawn by its seed.

        Raises:
            ConfigError: a class has too few texts for that.
        """
        train, seed, share = self.train, run.train.seed, run.finetune.holdout
        validation, test = self.validation, self.test
        if test is None:
            train, test = hold_out(train, share, seed, split=2)
        if validation is None:
            train, validation = hold_out(train, share, seed, split=1)
        if run.finetune.shots:
            train = draw_shots(train, run.finetune.shots, seed)
        return Splits(train, validation, test)

    def describe(self, run: RunConfig) -> list[str]:
        """Lines for the user."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        counts = ", ".join(f"{len(texts):,} {name}" for name, texts in parts.items() if texts is not None)
        missing = [name for name, texts in parts.items() if texts is None]
        lines = [f"task: {self.name}, {len(self.classes)} classes, {counts} texts"]
        if missing:
            lines[0] += (
                f" ({' and '.join(missing)}: {run.finetune.holdout:.0%} of the training texts, held out by seed)"
            )
        cut = sum(int(texts.cut.sum()) for texts in parts.values() if texts is not None)
        if cut:
            lines.append(
                f"{cut:,} texts are longer than the context: their first {run.model.sequence_length} tokens count"
            )
        rare = rare_classes(self.train) if missing else []
        if rare:
            names = ", ".join(one_line(name, LONGEST_NAME) for name in rare[:5]) + (", ..." if len(rare) > 5 else "")
            lines.append(f"{len(rare)} classes of one training text are learned and not held out: {names}")
        for split, reasons in self.skipped.items():
            lines += [f"{count} {split} rows left out: {reason}" for reason, count in reasons.items()]
        return lines


def open_texts(config: FinetuneConfig, tokenizer: Tokenizer, sequence_length: int) -> TaskTexts:
    """Read and encode every split that the task has.

    Raises:
        DataError: as ``open_labelled``; a test split without a training split; bad rows, unless they may be skipped.
    """
    spec, train = str(config.task), None
    found: dict[Split, LabelledSet] = {}
    for split in ("train", "validation", "test"):
        if split != "train" and not has_split(spec, split):
            continue
        found[split] = open_labelled(
            spec,
            split,
            text_key=config.text_key,
            label_key=config.label_key,
            classes=train.classes if train is not None else None,
            on_error="skip" if config.skip_bad_rows else "fail",
        )
        train = found["train"]
    texts = {split: encode_texts(labelled, tokenizer, sequence_length) for split, labelled in found.items()}
    skipped = {str(split): labelled.skipped for split, labelled in found.items() if labelled.skipped}
    return TaskTexts(found["train"].name, texts["train"], texts.get("validation"), texts.get("test"), skipped)


class ClassificationTask:
    """Labelled texts as a ``Task`` of the launcher."""

    def __init__(self, texts: TaskTexts) -> None:
        self.texts = texts
        self._splits: Splits | None = None
        self._padding = 0.0

    def configure(self, loaded: LoadedConfig) -> LoadedConfig:
        rows = len(self.texts.splits(loaded.config).train)
        return classifier_config(loaded, self.texts.classes, rows)

    def describe(self, run: RunConfig) -> list[str]:
        return self.texts.describe(run)

    def fingerprint(self) -> dict[str, str]:
        splits = {"training": self.texts.train, "validation": self.texts.validation, "test": self.texts.test}
        return {f"{name} texts": of_labelled(texts) for name, texts in splits.items() if texts is not None}

    def open(self, job: Job) -> tuple[LabelledBatches, LabelledTexts]:
        run = job.config.run
        self._splits = self.texts.splits(run)
        batches = LabelledBatches(self._splits.train, run.train.batch_size, run.train.seed)
        self._padding = round(batches.padding(job.config.micro_batch), 4)
        job.console.say(
            f"{len(self._splits.train):,} training texts, {len(self._splits.validation):,} for validation, "
            f"{len(self._splits.test):,} for the test; {run.train.steps} steps of {run.train.batch_size} texts, "
            f"{self._padding:.1%} of the positions are padding"
        )
        return batches, self._splits.validation

    def callbacks(self, job: Job, file: MetricsFile, health: RoutingHealth) -> tuple[Callback, Callback]:
        splits = self._splits
        assert splits is not None
        held_out = splits.validation
        validation = Validation(job.console, file, lambda session, most: classify(session, held_out, most), True)
        sizes = {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)}
        facts = {
            "task": self.texts.name,
            "texts": sizes,
            "truncated": {name: int(getattr(splits, name).cut.sum()) for name in sizes},
            "skipped": self.texts.skipped,
            "padding": self._padding,
        }

        def finish(session: Session) -> tuple[dict[str, Any], str]:
            return report(session, splits, job.run_dir)

        return validation, BestReport(job, file, health, finish, facts, "text")


def report(session: Session, splits: Splits, folder: Path) -> tuple[dict[str, Any], str]:
    """Scores on validation and test texts; rank 0 writes predictions and the confusion matrix of the test."""
    validation, test = classify(session, splits.validation), classify(session, splits.test)
    found = judge(test, splits.test.classes)
    if session.place.rank == 0:
        write_predictions(folder / "predictions.csv", splits.test, test)
        with suppress(NoPictures):  # said where the losses are drawn
            plot_confusion(folder / "confusion.png", test, splits.test.classes)
    summary = {**validation.row(), "test_loss": test.loss, **{f"test_{name}": value for name, value in found.items()}}
    return summary, f"test accuracy {test.accuracy:.2%}, macro-F1 {found['macro_f1']:.4f}; validation {validation}"


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class ClassScore:
    """Score of texts: mean cross-entropy in nats, and the class and its probability that the model gave to each."""

    loss: float
    labels_T: np.ndarray
    predictions_T: np.ndarray
    probabilities_T: np.ndarray

    @property
    def accuracy(self) -> float:
        return float((self.labels_T == self.predictions_T).mean())

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.2%}"

    def row(self) -> dict[str, float]:
        """The figures under the names of metrics."""
        return {"validation_loss": self.loss, "validation_accuracy": self.accuracy}


@torch.no_grad()
def classify(session: Session, texts: LabelledTexts, max_batches: int | None = None) -> ClassScore:
    """Score texts on all ranks together; all get the answer.

    Args:
        max_batches: of at least ``LEAST_ROWS`` texts on every rank; evenly spaced texts if these cannot hold all.
            None: all texts, in their order.

    Raises:
        Interrupted: a rank was asked to stop.
    """
    place, size = session.place, max(session.config.micro_batch, LEAST_ROWS)
    round_size = size * place.world_size
    count = len(texts) if max_batches is None else min(len(texts), max_batches * round_size)
    rows = np.linspace(0, len(texts) - 1, count).astype(int)
    by_length = np.argsort(texts.lengths[rows], kind="stable")
    rounds = -(-count // round_size)
    padded = np.append(by_length, np.full(rounds * round_size - count, -1))  # -1: a text that only fills the round up
    found = torch.zeros(3, count, dtype=torch.float64, device=session.device)
    session.engine.eval()
    try:
        for places in padded.reshape(rounds, place.world_size, size)[:, place.rank]:
            session.go_on()
            batch = texts.read(rows[places])
            logits_BC, _ = session.engine(torch.from_numpy(batch.inputs_BS).to(session.device))
            labels_B = torch.from_numpy(batch.targets_BS).to(session.device)
            losses_B = torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="none")
            best = logits_BC.double().softmax(dim=-1).max(dim=-1)
            mine = places >= 0
            found[:, places[mine]] = torch.stack([losses_B.double(), best.indices.double(), best.values])[:, mine]
    finally:
        session.engine.train()
    losses_T, predictions_T, probabilities_T = session.sum_over_ranks(found).cpu().numpy()
    return ClassScore(float(losses_T.mean()), texts.labels[rows], predictions_T.astype(int), probabilities_T)


def write_predictions(path: Path, texts: LabelledTexts, score: ClassScore) -> None:
    """CSV: label, prediction, probability of the prediction, text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["label", "prediction", "probability", "text"])
    for text, label, guess, sure in zip(
        texts.texts, score.labels_T, score.predictions_T, score.probabilities_T, strict=True
    ):
        writer.writerow([texts.classes[label], texts.classes[guess], f"{sure:.4f}", text])
    write_atomically(path, buffer.getvalue())


def judge(score: ClassScore, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro-F1 and, by class, precision, recall, F1 and number of texts; a class without any counts as 0."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        score.labels_T, score.predictions_T, labels=range(len(classes)), zero_division=0
    )
    names = ("precision", "recall", "f1", "texts")
    by_class = {
        name: {key: int(v) if key == "texts" else round(float(v), 4) for key, v in zip(names, values, strict=True)}
        for name, *values in zip(classes, *columns, strict=True)
    }
    return {"accuracy": score.accuracy, "macro_f1": float(columns[2].mean()), "by_class": by_class}


def plot_confusion(path: Path, score: ClassScore, classes: Sequence[str]) -> None:
    """Confusion matrix as PNG: texts by true and predicted class, coloured by their share of the true class.

    Where there is no room for numbers in the cells, those of the true classes stand behind their names.
    """
    from sklearn.metrics import confusion_matrix

    few = len(classes) <= 12
    counts_CC = confusion_matrix(score.labels_T, score.predictions_T, labels=range(len(classes)))
    totals_C = counts_CC.sum(axis=1)
    shares_CC = counts_CC / totals_C.clip(min=1)[:, None]
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in classes]
    size = 2 + 0.07 * max(map(len, names)) + 0.6 * len(classes) if few else 16
    figure, axes = pyplot().subplots(figsize=(size + 1, size))
    image = axes.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.046, label="share of the true class")
    if few:
        for (row, column), count in np.ndenumerate(counts_CC):
            colour = "white" if shares_CC[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
    told = names if few else [f"{name} ({total:,})" for name, total in zip(names, totals_C, strict=True)]
    font = 9 if few else 6
    axes.set_xticks(range(len(names)), names, rotation="vertical", fontsize=font)
    axes.set_yticks(range(len(names)), told, fontsize=font)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{len(score.labels_T):,} test texts\naccuracy {score.accuracy:.2%}", fontsize=11)
    save(figure, path)

"""Fine-tuning on labelled texts: the splits of a task, their scores, and the report of one run.

Legend: T texts, C classes.
"""

from __future__ import annotations

import csv
import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from vqmoe_ds.evaluation.classification import LONGEST_NAME, ClassScore, classify, judge, plot_confusion
from vqmoe_ds.evaluation.plots import NoPictures
from vqmoe_ds.evaluation.routing import RoutingHealth
from vqmoe_ds.finetune.callbacks import BestReport
from vqmoe_ds.finetune.config import classifier_config
from vqmoe_ds.models.session import Session
from vqmoe_ds.runtime.errors import one_line
from vqmoe_ds.runtime.files import write_atomically
from vqmoe_ds.train.callbacks import MetricsFile, Validation
from vqmoe_ds.train.job import Job
from vqmoe_ds.train.loop import Callback


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
            # The test first: it has the same texts whether or not the set has a validation split.
            train, test = hold_out(train, share, seed, split=2)
        if validation is None:
            train, validation = hold_out(train, share, seed, split=1)
        if run.finetune.shots:
            # Last, so that runs of one seed are validated and tested on the same texts whatever their number of shots.
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
        # All texts, not what a run draws of them: that follows from fields which check_same compares.
        splits = {"training": self.texts.train, "validation": self.texts.validation, "test": self.texts.test}
        return {f"{name} texts": of_labelled(texts) for name, texts in splits.items() if texts is not None}

    def open(self, job: Job) -> tuple[LabelledBatches, LabelledTexts]:
        run = job.config.run
        # Every rank draws for itself: the splits must follow from the seed alone.
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
    # classify is a collective, and so comes before what rank 0 does alone.
    validation, test = classify(session, splits.validation), classify(session, splits.test)
    found = judge(test, splits.test.classes)
    if session.place.rank == 0:
        write_predictions(folder / "predictions.csv", splits.test, test)
        with suppress(NoPictures):  # said where the losses are drawn
            plot_confusion(folder / "confusion.png", test, splits.test.classes)
    summary = {**validation.row(), "test_loss": test.loss, **{f"test_{name}": value for name, value in found.items()}}
    return summary, f"test accuracy {test.accuracy:.2%}, macro-F1 {found['macro_f1']:.4f}; validation {validation}"


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

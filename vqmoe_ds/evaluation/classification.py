"""Scores of a classifier on labelled texts or images.

Legend: T texts or images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.data.batches import Batch
from vqmoe_ds.evaluation.plots import pyplot, save
from vqmoe_ds.models.session import Session

LEAST_ROWS = 32
"""Texts of a forward pass in scoring, at least: without gradients there is room for more than in training."""
LONGEST_NAME = 50
"""Characters of a class that the confusion matrix shows."""


class Labelled(Protocol):
    """Labelled texts or images of one split."""

    @property
    def labels(self) -> np.ndarray:
        """int64 ``[len(self)]``"""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""

    def __len__(self) -> int: ...

    def read(self, positions: np.ndarray) -> Batch: ...


@dataclass(frozen=True)
class ClassScore:
    """Mean cross-entropy in nats of texts or images, and the class and its probability that the model gave to each.

    Attributes:
        energies_T: log-sum-exp of the logits, the negative energy of Liu 2020 (arXiv 2010.03759).
    """

    loss: float
    labels_T: np.ndarray
    predictions_T: np.ndarray
    probabilities_T: np.ndarray
    energies_T: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def accuracy(self) -> float:
        return float((self.labels_T == self.predictions_T).mean())

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.2%}"

    def row(self) -> dict[str, float]:
        """The figures under the names of metrics."""
        return {"validation_loss": self.loss, "validation_accuracy": self.accuracy}


def classify(session: Session, texts: Labelled, max_batches: int | None = None) -> ClassScore:
    """Score texts or images on all ranks together; all get the answer.

    Args:
        max_batches: of at least ``LEAST_ROWS`` texts on every rank; evenly spaced ones if these cannot hold all.
            None: all texts, in their order.

    Raises:
        Interrupted: a rank was asked to stop.
    """
    readers, size = session.config.readers, max(session.config.micro_batch, LEAST_ROWS)
    count = len(texts) if max_batches is None else min(len(texts), max_batches * size * readers)
    rows = np.linspace(0, len(texts) - 1, count).astype(int)
    session.engine.eval()
    try:
        score = Scoring(session.engine, session.device, size, session.reader, readers, session.sum_over_readers)
        return score(texts, rows, session.go_on)
    finally:
        session.engine.train()


@dataclass(frozen=True)
class Scoring:
    """Scores texts or images by a model in evaluation mode; its ranks do it together, and all get the answer.

    Attributes:
        model: gives logits ``[B, C]`` first.
        size: texts or images of a forward pass on every rank.
        rank, world: this process among those that read different texts or images.
        total: the sum of a tensor over these.
    """

    model: Callable[[Tensor], tuple[Tensor, Tensor]]
    device: torch.device
    size: int
    rank: int
    world: int
    total: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, texts: Labelled, rows: np.ndarray, before_each: Callable[[], Any]) -> ClassScore:
        """Score those at ``rows``, calling ``before_each`` forward pass on all ranks."""
        # Sorted by length, a batch needs little padding. Stable, for all ranks must deal out the same order, and ties
        # of NumPy's default sort depend on the processor.
        by_length = np.argsort(texts.lengths[rows], kind="stable")
        count, whole = len(rows), len(rows) - len(rows) % (self.size * self.world)
        # Where experts are spread each pass is a collective: in the last one, too, every rank has as many. What fills
        # it up is counted elsewhere.
        last = -(-(count - whole) // self.world)
        order = np.resize(by_length, whole + last * self.world)
        turns = np.arange(len(order))
        rounds = [*turns[:whole].reshape(-1, self.world, self.size)]
        if last:
            rounds.append(turns[whole:].reshape(self.world, last))
        # Each column is written by one rank and stays 0 on the others, so that the sum over ranks gathers them.
        found = torch.zeros(4, count, dtype=torch.float64, device=self.device)
        for dealt in rounds:
            before_each()
            places, counted = order[dealt[self.rank]], dealt[self.rank] < count
            batch = texts.read(rows[places])
            logits_BC, _ = self.model(torch.from_numpy(batch.inputs_BS).to(self.device))
            labels_B = torch.from_numpy(batch.targets_BS).to(self.device)
            losses_B = torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="none")
            # In float32 all that is nearly sure would round to 1, and ``out_of_distribution`` could not rank it.
            best = logits_BC.double().softmax(dim=-1).max(dim=-1)
            energies_B = logits_BC.double().logsumexp(dim=-1)
            told = torch.stack([losses_B.double(), best.indices.double(), best.values, energies_B])
            found[:, places[counted]] = told[:, counted]
        losses_T, predictions_T, *sure = self.total(found).cpu().numpy()
        return ClassScore(float(losses_T.mean()), texts.labels[rows], predictions_T.astype(int), *sure)


def judge(score: ClassScore, classes: Sequence[str], things: str = "texts") -> dict[str, Any]:
    """Accuracy, macro-F1 and, by class, precision, recall, F1 and number of texts; a class without any counts as 0.

    Args:
        things: what is classified, the name of their number.
    """
    from sklearn.metrics import precision_recall_fscore_support

    # All classes are named: scikit-learn would leave out those that are neither there nor predicted.
    columns = precision_recall_fscore_support(
        score.labels_T, score.predictions_T, labels=range(len(classes)), zero_division=0
    )
    names = ("precision", "recall", "f1", things)
    by_class = {
        name: {key: int(v) if key == things else round(float(v), 4) for key, v in zip(names, values, strict=True)}
        for name, *values in zip(classes, *columns, strict=True)
    }
    return {"accuracy": score.accuracy, "macro_f1": float(columns[2].mean()), "by_class": by_class}


def plot_confusion(path: Path, score: ClassScore, classes: Sequence[str], things: str = "test texts") -> None:
    """Confusion matrix as PNG: texts or images by true and predicted class, coloured by their share of the true class.

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
    axes.set_title(f"{len(score.labels_T):,} {things}\naccuracy {score.accuracy:.2%}", fontsize=11)
    save(figure, path)

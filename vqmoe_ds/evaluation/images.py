"""Accuracy of a classifier of images.

Legend: C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.checkpoint.load_model import LoadedModel
from vqmoe_ds.data.image_published import EXTRA, PublishedSplit, are_images, find_published
from vqmoe_ds.data.image_splits import ImageFiles, Wanted
from vqmoe_ds.data.images import DecodedWhenRead, ImageSet, open_images
from vqmoe_ds.evaluation.attacks import ATTACKS, attack
from vqmoe_ds.evaluation.classification import ClassScore, Scoring, judge
from vqmoe_ds.evaluation.corruption_error import relative_lines
from vqmoe_ds.evaluation.evaluate import about_model
from vqmoe_ds.evaluation.image_damage import Damaged, ImageCorruption
from vqmoe_ds.evaluation.out_of_distribution import OtherImages, line_of, told_apart
from vqmoe_ds.runtime.errors import ConfigError, DataError

TOGETHER = 128
"""Images of a forward pass."""


@dataclass
class ImageEvaluation:
    """Results of an evaluation, ready for JSON.

    Attributes:
        model: checkpoint, step, router and sizes.
        setting: data and split.
        clean: images, loss in nats, accuracy, macro-F1, scores by class, and the confusion matrix ``[C, C]`` (true by
            predicted class).
        corrupted: for each kind and severity of damage group, images, loss, accuracy, and its drop from the clean
            images.
        relative: ``corruption_errors`` of another model's; empty unless asked for.
        attacked: the same for each attack and its ``eps``, the largest change of a value, in 255ths.
        out_of_distribution: of each other set its name, number of images and changes, and ``told_apart``.
    """

    model: dict[str, Any]
    setting: dict[str, Any]
    clean: dict[str, Any]
    corrupted: list[dict[str, Any]] = field(default_factory=list)
    relative: dict[str, Any] = field(default_factory=dict)
    attacked: list[dict[str, Any]] = field(default_factory=list)
    out_of_distribution: list[dict[str, Any]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Figures for the user."""
        clean, model = self.clean, self.model
        there = {name: score for name, score in clean["by_class"].items() if score["images"]}
        worst, score = min(there.items(), key=lambda entry: entry[1]["recall"])
        absent = len(clean["by_class"]) - len(there)
        return [
            f"{model['checkpoint']}, step {model['step']}: {model['router']}, {model['experts']} experts",
            f"{clean['images']:,} images of {self.setting['images']}, {len(clean['by_class'])} classes"
            + (f", {absent} of them without images, whose F1 counts as 0" if absent else ""),
            f"accuracy {clean['accuracy']:.2%}, loss {clean['loss']:.4f} nats, macro-F1 {clean['macro_f1']:.4f}; "
            f"the hardest class is {worst}, of which {score['recall']:.2%} are found",
            *self._damage(),
            *relative_lines(self.relative),
            *(
                f"{row['attack']}, {row['eps']:g}/255: accuracy {row['accuracy']:.2%}, drop {row['drop']:.2%}"
                for row in self.attacked
            ),
            *map(line_of, self.out_of_distribution),
        ]

    def _damage(self) -> list[str]:
        """A line for each kind of damage, and the means of groups and of all kinds."""
        kinds = list(dict.fromkeys(row["kind"] for row in self.corrupted))
        every = "all but extra" if any(row["group"] == EXTRA for row in self.corrupted) else "all kinds"
        lines, drops = [], dict[str, list[float]]()
        for kind in kinds:
            rows = [row for row in self.corrupted if row["kind"] == kind]
            drop = sum(row["drop"] for row in rows) / len(rows)
            for group in (rows[0]["group"], *([every] if rows[0]["group"] != EXTRA else [])):
                drops.setdefault(group, []).append(drop)
            found = "  ".join(f"{row['severity']}: {row['accuracy']:.2%}" for row in rows)
            lines.append(f"{kind:<18} {found}  mean drop {drop:.2%}")
        lines += [f"{group:<18} mean drop {sum(some) / len(some):.2%}" for group, some in drops.items()]
        others = sorted({row["images"] for row in self.corrupted} - {self.clean["images"]})
        if others:
            numbers = " or ".join(f"{number:,}" for number in others)
            lines.append(
                f"{numbers} damaged images of some kinds, and {self.clean['images']:,} clean ones: a drop there is "
                "between different images"
            )
        return lines


def refuse_images(loaded: LoadedModel, data: Sequence[str]) -> None:
    """Refuse images for a model of text, which would read their files as text.

    Raises:
        DataError: they are.
    """
    for path in data:
        if are_images(path):
            raise DataError(
                f"{path} holds images, and {loaded.path} is a model of text; give text, or a model of images"
            )


def open_split(loaded: LoadedModel, data: Sequence[str] | None, split: str) -> tuple[ImageSet, str]:
    """The images to score, and their name for the user.

    Args:
        data: one path; None: the run's own.
        split: ``valid``: the test set, or what is held out where there is none; ``all``: of images without a test set
            all; ``auto``: ``all`` of such images that are named, else ``valid``.

    Raises:
        ConfigError: several paths, or ``all`` of images that have a test set.
        DataError: as ``open_images``, or other classes than the model's.
    """
    config = loaded.config
    if data is not None:
        if len(data) > 1:
            raise ConfigError("--data takes one file or folder of images")
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": data[0]})})
    found = open_images(config)
    files = found.files
    check_classes(files, config.data.classes, loaded.path)
    train, test = (part and DecodedWhenRead(part, found.wanted) for part in (files.train, files.test))
    training, held = found.sets(config.model.sequence_length, train, test)
    if files.test is not None:
        if split == "all":
            raise ConfigError(f"images {files.name} have a test set; --split all is for images without one")
        return held, f"the test set of {files.name}"
    if split == "all" or (split == "auto" and data is not None):
        # With what training holds out.
        return replace(training, rows=np.arange(len(training.labels_N))), files.name
    return held, f"the held-out share of {files.name}"


def check_classes(files: ImageFiles, known: tuple[str, ...], model: str | Path) -> None:
    """Refuse images of other classes than the model of that name knows.

    Raises:
        DataError: they are.
    """
    # In the same order, too: a label is the number of a logit.
    if files.classes != known:
        odd = sorted(set(files.classes) ^ set(known))
        which = f"{odd[0]!r} is only on one side" if odd else "they are in another order"
        raise DataError(
            f"images {files.name} are of other classes than {model} knows ({which}); give images of these, all of them"
        )


class DamagedSet(NamedTuple):
    """Damaged images of one kind and severity."""

    kind: str
    severity: int
    group: str
    load: Callable[[], ImageSet]

    def evenly(self, most: int) -> DamagedSet:
        """The same with at most so many of the images."""
        return self._replace(load=lambda: self.load().evenly(most))


def damaged_here(images: ImageSet, corruptions: Iterable[ImageCorruption]) -> list[DamagedSet]:
    """Images as ``image_damage`` damages them."""

    def opened(corruption: ImageCorruption) -> ImageSet:
        return replace(images, images_NHHC=Damaged(images.images_NHHC, corruption))

    return [DamagedSet(*each, each.group, partial(opened, each)) for each in corruptions]


def open_published(loaded: LoadedModel, data: Sequence[str] | None) -> tuple[list[str] | None, list[DamagedSet]]:
    """The published damage of a path of ``--data``; and the other paths, None where there are none.

    Raises:
        ConfigError: several such paths.
        DataError: as ``find_published``, or the first images of a kind and severity are broken or of another size.
    """
    config = loaded.config
    found = {path: find_published(path, config.data.classes) for path in data or ()}
    published = [parts for parts in found.values() if parts is not None]
    if len(published) > 1:
        raise ConfigError("--data takes one folder of published damage")
    wanted = Wanted(config.model.image_size, config.model.channels, config.data.resize)

    def opened(part: PublishedSplit) -> ImageSet:
        split, patches = part.load(), config.model.sequence_length
        rows = np.arange(len(split.labels_N))
        return ImageSet(DecodedWhenRead(split, wanted), split.labels_N, rows, config.data.classes, patches)

    parts = published[0] if published else []
    sets = [DamagedSet(part.kind, part.severity, part.group, partial(opened, part)) for part in parts]
    # Reversed, so that of each kind the first severity stays.
    for kind in {each.kind: each for each in reversed(sets)}.values():
        kind.load().read(np.zeros(1, int))  # before long work
    return [path for path, some in found.items() if some is None] or None, sets


def evaluate_images(
    loaded: LoadedModel,
    images: ImageSet,
    name: str,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[str, int], Callable[[int], Any]] | None = None,
    damaged: Sequence[DamagedSet] = (),
    attacks: Sequence[tuple[str, float]] = (),
    others: Sequence[OtherImages] = (),
) -> ImageEvaluation:
    """Score images, clean, damaged and attacked; deterministic, and the same on all ranks.

    Args:
        loaded: of ``load_model``; with experts on several ranks all of them call this together.
        name: of the images, for the user.
        batch_size: images per forward pass; None: ``TOGETHER``.
        rank, world: this process among those that share the images.
        progress: given a name and the number of images, returns what is told about images done.
        attacks: names of ``ATTACKS``, each with the largest change of a value in 255ths.
        others: images of something else, which the model should be less sure of.
    """
    size = batch_size or TOGETHER
    scoring = Scoring(loaded.model, loaded.device, size, rank, world, _sum_over_ranks if world > 1 else lambda x: x)

    def scored(part: ImageSet, what: str) -> ClassScore:
        tell = progress(what, len(part)) if progress is not None else None
        return scoring(part, np.arange(len(part)), lambda: tell and tell(size * world))

    score = scored(images, "clean")
    result = ImageEvaluation(about_model(loaded), {"images": name}, _clean(score, images.classes))

    def figures(part: ImageSet, what: str) -> dict[str, float]:
        found, images = scored(part, what), len(part)
        drop = score.accuracy - found.accuracy
        return {"images": images, "loss": found.loss, "accuracy": found.accuracy, "drop": drop}

    for kind, severity, group, opened in damaged:
        found = figures(opened(), f"{kind} {severity}")
        result.corrupted.append({"kind": kind, "severity": severity, "group": group, **found})
    for attack_name, eps in attacks:
        attacked = replace(images, images_NHHC=Attacked(images, loaded, attack_name, eps))
        result.attacked.append({"attack": attack_name, "eps": eps, **figures(attacked, f"{attack_name}, {eps:g}/255")})
    for other in others:
        unknown = scored(other.images, other.name)
        result.out_of_distribution.append({**other.about(), **told_apart(score, unknown)})
    return result


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def _clean(score: ClassScore, classes: Sequence[str]) -> dict[str, Any]:
    from sklearn.metrics import confusion_matrix

    counts_CC = confusion_matrix(score.labels_T, score.predictions_T, labels=range(len(classes)))
    figures = {"images": len(score.labels_T), "loss": score.loss, **judge(score, classes, "images")}
    return {**figures, "confusion": counts_CC.tolist()}


class Attacked:
    """Images of a set, attacked through a model as they are read: float32 from 0 to 1.

    With experts on several ranks all of them read together, equally many.
    """

    def __init__(self, images: ImageSet, loaded: LoadedModel, name: str, eps: float) -> None:
        self.images, self.loaded, self.name, self.eps = images, loaded, name, eps

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(self.images.images_NHHC[rows]).to(self.loaded.device).float() / 255
        labels_B = torch.from_numpy(self.images.labels_N[rows]).to(self.loaded.device)

        def loss(x_BHHC: Tensor) -> Tensor:
            logits_BC, _ = self.loaded.model(x_BHHC)
            return F.cross_entropy(logits_BC, labels_B, reduction="none")

        # By the number of the image in its set: neither ranks, batches nor --max_tokens change its attack.
        draws = [np.random.default_rng((list(ATTACKS).index(self.name), int(row))) for row in rows]
        return attack(self.name, loss, pixels, self.eps / 255, draws).cpu().numpy()

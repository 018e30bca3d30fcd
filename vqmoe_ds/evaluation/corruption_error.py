"""Errors on damaged images relative to those of another model (Hendrycks 2019, arXiv 1903.12261)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqmoe_ds.data.image_published import EXTRA
from vqmoe_ds.runtime.errors import DataError, one_line, shown
from vqmoe_ds.runtime.files import read_small


@dataclass(frozen=True)
class Reference:
    """Scores of another model on the same images, of a file that ``--json`` wrote.

    Attributes:
        errors: share of wrong answers by kind and severity.
        clean: that of the clean images.
        images: number of clean images by class.
        published: whether the damage is a published folder's.
    """

    file: str
    errors: Mapping[tuple[str, int], float]
    clean: float
    images: Mapping[str, int]
    published: bool

    def check(self, asked: Iterable[tuple[str, int]], images: Mapping[str, int], published: bool) -> None:
        """Refuse scores of other images or of other damage.

        Args:
            asked: kinds and severities that are scored now.
            images, published: as the attributes.

        Raises:
            DataError: they are.
        """
        missing = [f"{kind} {severity}" for kind, severity in asked if (kind, severity) not in self.errors]
        if missing:
            raise DataError(
                f"--relative_to {self.file} has no scores of {missing[0]}; evaluate that model on the same damage"
            )
        theirs, ours = (sum(counts.values()) for counts in (self.images, images))
        if (theirs, self.published) != (ours, published):
            kinds = {True: "published damage", False: "damage made here"}
            raise DataError(
                f"--relative_to {self.file} is of {theirs:,} images and {kinds[self.published]}, and this is of "
                f"{ours:,} and {kinds[published]}; evaluate both models on the same"
            )
        odd = sorted(name for name in {*self.images, *images} if self.images.get(name, 0) != images.get(name, 0))
        if odd:
            raise DataError(
                f"--relative_to {self.file} has {self.images.get(odd[0], 0):,} images of {shown(odd[0])}, and this has "
                f"{images.get(odd[0], 0):,}; evaluate both models on the same"
            )

    def corruption_errors(self, clean: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Corruption errors of another model, in percent of this one's.

        ``ce`` by kind is ``sum_s E(s) / sum_s E_ref(s)``, the sums over severities, and ``relative_ce`` the same of
        ``E(s) - E_clean``; ``mce`` and ``relative_mce`` are their means over the kinds that are not extra. None where
        the reference has no errors, or where none come from the damage.

        Args:
            clean: share of wrong answers on the clean images.
            rows: ``ImageEvaluation.corrupted`` of the other model.
        """
        by_kind: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            by_kind.setdefault(row["kind"], []).append(row)
        answer: dict[str, Any] = {"to": self.file}
        for name, ours, theirs in (("ce", 0.0, 0.0), ("relative_ce", clean, self.clean)):
            found = {
                kind: _percent(
                    sum(1 - row["accuracy"] - ours for row in some),
                    sum(self.errors[kind, row["severity"]] - theirs for row in some),
                )
                for kind, some in by_kind.items()
            }
            counted = [found[kind] for kind, some in by_kind.items() if some[0]["group"] != EXTRA]
            known = [value for value in counted if value is not None]
            # A mean over the kinds that happen to have a ratio would compare with no other model's.
            mean = sum(known) / len(known) if known and len(known) == len(counted) else None
            answer |= {name: found, f"{name.removesuffix('ce')}mce": mean}
        return answer


def _percent(part: float, whole: float) -> float | None:
    # Sums of differences of accuracies: what is 0 exactly comes out as about 1e-16.
    return 100 * part / whole if whole > 1e-12 else None


def read_reference(file: str) -> Reference:
    """The scores of a file.

    Raises:
        DataError: it cannot be read, or has none of damaged images.
    """
    try:
        scores = json.loads(read_small(file))
        rows, clean = scores["corrupted"], scores["clean"]
        errors = {(str(row["kind"]), _count(row["severity"])): _error(row["accuracy"]) for row in rows}
        if len(errors) < len(rows):
            raise ValueError("it has two scores of one kind and severity")
        images = {name: _count(each["images"]) for name, each in clean["by_class"].items()}
        published = scores["setting"].get("damage") == "published"
        reference = Reference(file, errors, _error(clean["accuracy"]), images, published)
    # The user names the file, so it may be JSON of any shape and depth.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(f"{type(error).__name__}: {error}", 200)
        raise DataError(
            f"--relative_to {file} has no scores of images ({reason}); give a file that --json wrote"
        ) from None
    if not errors:
        raise DataError(f"--relative_to {file} has no scores of damaged images; evaluate that model on the same damage")
    return reference


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{shown(value)} is no number of images or severity")
    return value


def _error(accuracy: Any) -> float:
    # By type, for True is an instance of int.
    if type(accuracy) not in (int, float) or not 0 <= accuracy <= 1:
        raise ValueError(f"{shown(accuracy)} is no share of right answers")
    return 1 - float(accuracy)


def relative_lines(relative: Mapping[str, Any]) -> list[str]:
    """Figures of ``Reference.corruption_errors`` for the user."""
    if not relative:
        return []
    by_kind = "  ".join(f"{kind} {_shown(value)}" for kind, value in relative["ce"].items())
    return [
        f"corruption errors in percent of those in {relative['to']}: {by_kind}",
        f"mCE {_shown(relative['mce'])}, relative mCE {_shown(relative['relative_mce'])}",
    ]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"

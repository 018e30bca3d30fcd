"""Corruption errors by hand, and files that are no scores."""

from __future__ import annotations

import json

import pytest

from vqmoe_ds.evaluation.corruption_error import read_reference, relative_lines
from vqmoe_ds.runtime.errors import DataError


def row(kind: str, severity: int, accuracy: float, group: str = "weather") -> dict:
    return {"kind": kind, "severity": severity, "group": group, "accuracy": accuracy, "loss": 1.0}


def scores(clean: float, *rows: dict, images: int = 100, damage: str = "made here") -> dict:
    by_class = {"cat": {"images": images - 40}, "dog": {"images": 40}}
    clean_part = {"accuracy": clean, "images": images, "by_class": by_class}
    return {"clean": clean_part, "corrupted": list(rows), "setting": {"damage": damage}}


@pytest.fixture
def reference(tmp_path):
    file = tmp_path / "top2.json"
    rows = row("fog", 1, 0.75), row("fog", 2, 0.5), row("snow", 1, 0.5), row("spatter", 1, 0.2, "extra")
    file.write_text(json.dumps(scores(0.875, *rows)))
    return read_reference(str(file))


def test_errors_are_summed_over_severities_and_their_ratios_averaged_over_kinds(reference):
    ours = [row("fog", 1, 0.875), row("fog", 2, 0.625), row("snow", 1, 0.25), row("spatter", 1, 0.6, "extra")]
    found = reference.corruption_errors(0.0625, ours)
    # fog: (1/8 + 3/8) / (1/4 + 1/2); snow: 3/4 / 1/2; less the clean errors, 1/16 of ours and 1/8 of theirs:
    assert found["ce"] == pytest.approx({"fog": 100 * 2 / 3, "snow": 150, "spatter": 50})
    assert found["mce"] == pytest.approx((100 * 2 / 3 + 150) / 2)
    assert found["relative_ce"]["fog"] == pytest.approx(100 * (6 / 16) / (4 / 8))
    assert found["relative_ce"]["snow"] == pytest.approx(100 * (11 / 16) / (3 / 8))
    assert found["relative_mce"] == pytest.approx((75 + 100 * 11 / 6) / 2)
    first, second = relative_lines(found)
    assert "fog 66.7  snow 150.0  spatter 50.0" in first and reference.file in first
    assert second == "mCE 108.3, relative mCE 129.2"


def test_a_model_is_a_hundred_percent_of_itself(reference):
    same = [row(kind, severity, 1 - error) for (kind, severity), error in reference.errors.items()]
    found = reference.corruption_errors(reference.clean, same)
    assert (found["mce"], found["relative_mce"]) == (pytest.approx(100), pytest.approx(100))


def test_nothing_is_relative_to_no_errors(tmp_path):
    (tmp_path / "perfect.json").write_text(json.dumps(scores(1.0, row("fog", 1, 1.0), row("snow", 1, 0.5))))
    found = read_reference(str(tmp_path / "perfect.json")).corruption_errors(
        0.0, [row("fog", 1, 0.5), row("snow", 1, 0.5)]
    )
    assert found["ce"] == {"fog": None, "snow": pytest.approx(100)} and found["mce"] is None
    assert relative_lines(found)[1] == "mCE –, relative mCE –" and relative_lines({}) == []


def test_scores_of_other_damage_or_images_are_refused(reference):
    same = {"cat": 60, "dog": 40}
    reference.check([("fog", 2), ("snow", 1)], same, False)
    with pytest.raises(DataError, match="has no scores of snow 2; evaluate that model on the same damage"):
        reference.check([("fog", 2), ("snow", 2)], same, False)
    with pytest.raises(DataError, match="is of 100 images and damage made here, and this is of 90 and damage made"):
        reference.check([("fog", 1)], {"cat": 60, "dog": 30}, False)
    with pytest.raises(DataError, match="this is of 100 and published damage"):
        reference.check([("fog", 1)], same, True)
    with pytest.raises(DataError, match="has 60 images of 'cat', and this has 59; evaluate both models on the same"):
        reference.check([("fog", 1)], {"cat": 59, "dog": 41}, False)
    with pytest.raises(DataError, match="has 0 images of 'bird', and this has 60"):
        reference.check([("fog", 1)], {"bird": 60, "dog": 40}, False)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{}", "has no scores of images"),
        ("words", "has no scores of images"),
        ("[]", "has no scores of images"),
        ('{"corrupted": [{"kind": "word_swap", "rate": 0.1}]}', "has no scores of images"),
        (json.dumps(scores(0.5)), "has no scores of damaged images"),
        (json.dumps(scores(0.5, row("fog", 1, -7))), "-7 is no share of right answers"),
        (json.dumps(scores(0.5, row("fog", 1, float("nan")))), "nan is no share of right answers"),
        (json.dumps(scores(0.5, row("fog", 1, True))), "True is no share of right answers"),
        (json.dumps(scores(10**400, row("fog", 1, 0.5))), "is no share of right answers"),
        (
            json.dumps(scores(0.5, row("fog", 1, 0.5))).replace('"severity": 1', '"severity": Infinity'),
            "inf is no number",
        ),
        (json.dumps(scores(0.5, row("fog", 1, 0.5), row("fog", 1, 0.4))), "two scores of one kind and severity"),
    ],
)
def test_other_files_are_refused(content, sentence, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_reference(str(tmp_path / "x.json"))
    with pytest.raises(DataError, match="No such file"):
        read_reference(str(tmp_path / "y.json"))

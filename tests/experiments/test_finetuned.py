"""Fine-tunings side by side: means, paired differences, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vqmoe_ds.experiments.finetuned import build_parser, main


def _finish(folder: Path, seed: int, shots: int, accuracy: float, task: str = "sst2") -> None:
    folder.mkdir(parents=True)
    summary = {
        **{"task": task, "seed": seed, "test_accuracy": accuracy, "test_macro_f1": accuracy / 2},
        **{"validation_loss": 0.5, "finetune": {"shots": shots}, "parameters": {"active": 1234}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def _compare(*arguments: object) -> int:
    return main(build_parser("").parse_args([str(a) for a in arguments]))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for seed, (ours, theirs) in enumerate([(0.70, 0.80), (0.72, 0.84)], 1):
        _finish(tmp_path / f"a/seed-{seed}", seed, 0, ours)
        _finish(tmp_path / f"b/seed-{seed}", seed, 0, theirs)
    (tmp_path / "a/summary.json").write_text(json.dumps({"task": "sst2", "rows": [], "finetune": {}}))  # of both seeds
    return tmp_path / "a", tmp_path / "b"


def test_means_and_differences_seed_by_seed(folders, capsys):
    assert _compare(f"vq={folders[0]}", f"top-2={folders[1]}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| vq | all | 1,234 | 2 | 71.00 ± 1.00 | 0.3550 ± 0.0050 |  |" in lines
    # 10 and 12 points: mean 11, standard error 1, t of one degree of freedom 12.706
    assert "| top-2 | all | 1,234 | 2 | 82.00 ± 2.00 | 0.4100 ± 0.0100 | +11.00 [-1.71, +23.71] |" in lines


def test_shots_are_rows_and_a_curve_and_the_bag_of_words_stands_beside(folders, tmp_path, capsys):
    _finish(tmp_path / "a/shots-4/seed-1", 1, 4, 0.5)
    _finish(tmp_path / "b/shots-4/seed-1", 1, 4, 0.6)
    rows = [{"task": "sst2", "shots": s, "seed": 1, "accuracy": 0.9, "macro_f1": 0.9} for s in ("all", 4, 64)]
    (tmp_path / "bag.json").write_text(json.dumps(rows))
    options = ("--bag_of_words", tmp_path / "bag.json", "--out", tmp_path / "report")
    assert _compare(f"vq={folders[0]}", f"top-2={folders[1]}", *options) == 0
    text = (tmp_path / "report/table.md").read_text()
    assert "| top-2 | 4 | 1,234 | 1 | 60.00 | 0.3000 | +10.00 (one seed) |" in text
    assert "| bag of words | 4 | – | 1 | 90.00 | 0.9000 | +40.00 (one seed) |" in text
    assert "| bag of words | 64 |" not in text, "nothing to stand beside"
    assert (tmp_path / "report/shots.png").stat().st_size > 1000


def test_adaptation_to_a_text_has_where_it_began_and_a_curve(tmp_path, capsys):
    for name, ends in {"vq": (3.0, 2.5), "top-2": (3.2, 2.1)}.items():
        rows = [{"step": step, "validation_bits_per_byte": bits} for step, bits in zip((0, 20), ends, strict=True)]
        facts = {"task": "lm", "data": "plays", "seed": 1, "finetune": {"shots": 0}, "parameters": {"active": 7}}
        best = {"validation_loss": 1.0, "validation_bits_per_byte": ends[1], "validations": rows}
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(facts | best))
    assert _compare(f"vq={tmp_path / 'vq'}", f"top-2={tmp_path / 'top-2'}", "--out", tmp_path) == 0
    assert "| top-2 | all | 7 | 1 | 3.2000 | 2.1000 | 1.0000 | -0.4000 (one seed) |" in capsys.readouterr().out
    assert (tmp_path / "steps.png").stat().st_size > 1000 and not (tmp_path / "shots.png").exists()
    facts = json.loads((tmp_path / "vq/summary.json").read_text()) | {"validation_bits_per_byte": None}
    (tmp_path / "unknown").mkdir()  # its tokenizer is, and so are the bytes of its tokens
    (tmp_path / "unknown/summary.json").write_text(json.dumps(facts))
    assert _compare(f"vq={tmp_path / 'vq'}", f"unknown={tmp_path / 'unknown'}") == 0
    assert "| unknown | all | 7 | 1 | – | – | 1.0000 | – |" in capsys.readouterr().out


@pytest.mark.parametrize(("spec", "sentence"), [("runs/a", "NAME=FOLDER"), ("vq=nowhere", "no finished fine-tuning")])
def test_what_is_no_run_is_refused_in_one_sentence(spec, sentence, capsys):
    assert _compare(spec) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1

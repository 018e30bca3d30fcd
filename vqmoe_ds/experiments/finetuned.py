"""``tools/compare_finetuned.py``: fine-tunings of several models side by side, seed by seed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqmoe_ds.evaluation.plots import drawing, pyplot, save
from vqmoe_ds.evaluation.statistics import mean_of, paired_difference
from vqmoe_ds.experiments.measures import number, read_json, readable, whole
from vqmoe_ds.experiments.page import Page, Table
from vqmoe_ds.finetune.report import draw_means, over_shots
from vqmoe_ds.runtime.errors import ConfigError, DataError, reports_errors
from vqmoe_ds.runtime.files import list_tree, make_folder, write_atomically

ACCURACY, MACRO_F1, BITS, LOSS = "test_accuracy", "test_macro_f1", "validation_bits_per_byte", "validation_loss"
BEFORE = "bits_per_byte_before"
BAG_OF_WORDS = "bag of words"
NOTE = (
    "Mean ± standard error over seeds. The difference to the first model is taken seed by seed: mean and 95 % "
    "confidence interval (Student's t); where it contains zero, nothing is said to be better."
)


@dataclass(frozen=True)
class Run:
    """One finished fine-tuning: of ``model``, on ``task`` with so many ``shots`` (0: all texts)."""

    model: str
    task: str
    shots: int
    seed: int
    active: int | None
    """Parameters used per token."""
    values: dict[str, float]
    curve: dict[int, float] = field(default_factory=dict)
    """Bits per byte at the validations of a language model, by step; 0 is before it learned anything."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="NAME=FOLDER", help="run folders of fine-tunings; a name may come several times")
    add("--bag_of_words", metavar="JSON", help="figures of benchmarks/bag_of_words.py --json, shown beside them")
    add(
        "--out", metavar="FOLDER", help="also write table.md and the curves: shots.png over shots, steps.png over steps"
    )
    return parser


@reports_errors
def main(options: argparse.Namespace) -> int:
    """Print the table; the exit code."""
    try:
        runs = [run for spec in options.runs for run in read_runs(spec)]
        runs += read_bag_of_words(options.bag_of_words, runs) if options.bag_of_words else []
        page = report(runs)
        print(page.markdown())
        if options.out:
            folder = Path(options.out)
            make_folder(folder)
            write_atomically(folder / "table.md", page.markdown())
            with drawing(print):
                if len({run.shots for run in runs if ACCURACY in run.values}) > 1:
                    plot_shots(folder / "shots.png", runs)
                if any(run.curve for run in runs):
                    plot_steps(folder / "steps.png", runs)
    except OSError as error:
        raise ConfigError(f"--out {options.out} cannot be written ({error.strerror}); name another folder") from None
    return 0


def read_runs(spec: str) -> list[Run]:
    """The finished runs of ``NAME=FOLDER``: one, or one for every seed and number of shots.

    Raises:
        DataError: not of that form, or nothing finished there.
    """
    name, equals, place = spec.partition("=")
    if not (name and equals and place):
        raise DataError(f"{spec} is not of the form NAME=FOLDER; say what the model is called in the table")
    try:
        names = list_tree(place)[0] if os.path.isdir(place) else []
    except OSError as error:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}); give another folder") from None
    files = sorted(Path(place) / name for name in names if os.path.basename(name) == "summary.json")
    # The summary over several seeds, in the folder above theirs, has no seed; that of a pretraining no ``finetune``.
    found = {path: summary for path in files if {"seed", "finetune"} <= (summary := _read(path)).keys()}
    if not found:
        raise DataError(
            f"{place} has no finished fine-tuning (summary.json); give a run folder of launchers/finetune.py"
        )
    runs = []
    for path, summary in found.items():
        with readable(path):
            runs.append(_run(name, summary))
    return runs


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _run(name: str, summary: dict[str, Any]) -> Run:
    values = {key: number(summary[key]) for key in (ACCURACY, MACRO_F1, BITS, LOSS) if summary.get(key) is not None}
    data = summary.get("data")
    task = summary["task"] if data is None else f"{summary['task']} on {data}"
    rows = [row for row in summary.get("validations", ()) if row.get(BITS) is not None]
    if BITS in values and rows:
        values[BEFORE] = number(rows[0][BITS])
    shots, seed, active = (
        whole(value) for value in (summary["finetune"]["shots"], summary["seed"], summary["parameters"]["active"])
    )
    return Run(name, task, shots, seed, active, values, {whole(row["step"]): number(row[BITS]) for row in rows})


def read_bag_of_words(path: str, beside: Sequence[Run]) -> list[Run]:
    """Figures of the benchmark for the tasks and shots of ``beside``.

    Raises:
        DataError: it is not a file of that benchmark.
    """
    wanted = {(run.task, run.shots) for run in beside}
    try:
        rows = read_json(Path(path))
        found = [
            Run(
                BAG_OF_WORDS,
                str(row["task"]),
                0 if row["shots"] == "all" else whole(row["shots"]),
                whole(row["seed"]),
                None,
                {ACCURACY: number(row["accuracy"]), MACRO_F1: number(row["macro_f1"])},
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no output of benchmarks/bag_of_words.py --json ({error})") from None
    return [run for run in found if (run.task, run.shots) in wanted]


def report(runs: Sequence[Run]) -> Page:
    """A table for every task, a row for every model and number of shots."""
    page = Page("Fine-tuned models")
    page.add(NOTE)
    for task in dict.fromkeys(run.task for run in runs):
        page.add(_table(task, [run for run in runs if run.task == task]))
    return page


def _table(task: str, runs: Sequence[Run]) -> Table:
    classified = ACCURACY in runs[0].values
    measures = {ACCURACY: "test accuracy %", MACRO_F1: "macro-F1"}
    if not classified:
        measures = {BEFORE: "bits/byte before", BITS: "bits/byte", LOSS: "loss"}
    judged = ACCURACY if classified else BITS if BITS in runs[0].values else LOSS
    first, rows = runs[0].model, []
    for shots, model in dict.fromkeys((run.shots, run.model) for run in sorted(runs, key=lambda run: run.shots)):
        ours, theirs = ([run for run in runs if (run.shots, run.model) == (shots, which)] for which in (model, first))
        active = ours[0].active
        row = [model, str(shots or "all"), f"{active:,}" if active else "–", str(len(ours))]
        row += [_mean([run.values[m] for run in ours if m in run.values], m) for m in measures]
        rows.append([*row, "" if model == first else _difference(ours, theirs, judged)])
    titles = ["used by a token", "seeds", *measures.values(), f"{measures[judged]} − {first}"]
    return Table([task, "texts a class", *titles], rows)


def _mean(values: Sequence[float], measure: str) -> str:
    return mean_of([value * _scale(measure) for value in values]).show(f".{_digits(measure)}f") if values else "–"


def _difference(ours: Sequence[Run], theirs: Sequence[Run], measure: str) -> str:
    a, b = (
        {run.seed: run.values[measure] * _scale(measure) for run in runs if measure in run.values}
        for runs in (ours, theirs)
    )
    found = paired_difference(a, b)
    return found.show(_digits(measure)) if found is not None else "no common seed" if a and b else "–"


def _scale(measure: str) -> float:
    return 100.0 if measure == ACCURACY else 1.0


def _digits(measure: str) -> int:
    return 2 if measure == ACCURACY else 4


def plot_shots(path: Path, runs: Sequence[Run]) -> None:
    """Test accuracy over the texts of each class, a picture for every task and a line for every model, as PNG."""
    few = [run for run in runs if run.shots and ACCURACY in run.values]
    tasks = list(dict.fromkeys(run.task for run in few))
    figure, grid = pyplot().subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for axes, task in zip(grid[0], tasks, strict=True):
        shots = sorted({run.shots for run in few if run.task == task})
        for model, runs_of in _by_model(few, task).items():
            _line(axes, model, {n: [r.values[ACCURACY] for r in runs_of if r.shots == n] for n in shots})
        over_shots(axes, shots)
        axes.set_title(task)
        axes.legend()
    save(figure, path)


def plot_steps(path: Path, runs: Sequence[Run]) -> None:
    """Bits per byte over the steps of adaptation, a picture for every text and a line for every model, as PNG."""
    texts = list(dict.fromkeys(run.task for run in runs if run.curve))
    figure, grid = pyplot().subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False)
    for axes, task in zip(grid[0], texts, strict=True):
        for model, runs_of in _by_model(runs, task).items():
            steps = sorted({step for run in runs_of for step in run.curve})
            _line(axes, model, {n: [run.curve[n] for run in runs_of if n in run.curve] for n in steps})
        axes.set(title=Path(task).name, xlabel="step", ylabel="bits/byte on held-out text")
        axes.legend()
    save(figure, path)


def _by_model(runs: Sequence[Run], task: str) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.task == task:
            found.setdefault(run.model, []).append(run)
    return found


def _line(axes: Any, label: str, values: dict[int, list[float]]) -> None:
    draw_means(axes, {place: mean_of(some) for place, some in values.items() if some}, label)

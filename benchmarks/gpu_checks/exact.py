"""Check 5: with ``train.deterministic`` two runs are equal to the last bit, and a resumed one is too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from vqmoe_ds.runtime.device import make_deterministic

from . import training
from .frame import Bench, Finding, attempt, equal
from .report import MEASURED

STEPS, RESUMED = 20, 10

Run = tuple[list[float], dict[str, Tensor]]
"""Losses and last weights and buffers."""


def run(bench: Bench) -> Iterator[Finding]:
    with _deterministic():
        yield from attempt("train.deterministic", lambda: _repeat(bench, "train.deterministic", True))
    # Attention's backward on a GPU may add in any order then: whether runs are equal is told, and nothing is promised.
    yield from attempt("default", lambda: _repeat(bench, "default", not bench.cuda))


def _repeat(bench: Bench, how: str, promised: bool) -> Iterator[Finding]:
    folder = bench.folder / "exact"
    shutil.rmtree(folder, ignore_errors=True)
    first = _train(bench, save=folder)
    again = _train(bench)
    yield _told(f"two runs of {STEPS} steps, {how}", _same(first, again), promised)
    (tag,) = folder.glob("global_step*")
    resumed = _train(bench, resume=tag)
    yield _told(f"resumed at {RESUMED}, {how}", _same((first[0][RESUMED:], first[1]), resumed), promised)


def _told(case: str, same: dict[str, bool], promised: bool) -> Finding:
    return equal(case, same) if promised else Finding(case, MEASURED, {"equal": all(same.values())})


def _train(bench: Bench, save: Path | None = None, resume: Path | None = None) -> Run:
    run = training.fields(bench, moe__top_k=1)
    with training.trainer(bench, run, training.settings(2, "bf16"), resume) as loop:
        losses = training.losses(loop, RESUMED)
        if save is not None:
            training.save(loop, save)
        if resume is None:
            losses += training.losses(loop, STEPS - RESUMED)
        return losses, training.state(loop)


def _same(here: Run, there: Run) -> dict[str, bool]:
    return {"losses": here[0] == there[0], "weights and codes": training.same_state(here[1], there[1])}


@contextmanager
def _deterministic() -> Iterator[None]:
    """Settings of a run with ``train.deterministic``: on a GPU an operation that has no deterministic kernel raises."""
    make_deterministic(True)
    try:
        yield
    finally:
        make_deterministic(False)

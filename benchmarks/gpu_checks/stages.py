"""Check 4: five steps at every ZeRO stage in every precision; the loss scale of fp16 falls and training goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from . import training
from .frame import Bench, Finding, attempt
from .report import FAILED, PASSED, SKIPPED

STEPS = 5
ORDER = (1, 2, 3, 0)
AGREE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest difference of the losses of a stage from those of ZeRO-1."""


def run(bench: Bench) -> Iterator[Finding]:
    for precision in AGREE:
        reference: list[float] = []
        for stage in ORDER:
            yield from attempt(f"ZeRO-{stage}, {precision}", partial(_train, bench, stage, precision, reference))
    for stage in range(3):
        if bench.cuda:
            yield from attempt(f"ZeRO-{stage}, fp16", partial(_search_scale, bench, stage))
        else:
            yield Finding(f"ZeRO-{stage}, fp16", SKIPPED, why="PyTorch's fp16 training needs a GPU")


def _train(bench: Bench, stage: int, precision: str, reference: list[float]) -> Finding:
    """Five steps; ``reference`` holds the losses of ZeRO-1, which are put there when they are known."""
    started = time.perf_counter()
    with training.trainer(bench, training.fields(bench), training.settings(stage, precision)) as loop:
        losses = training.losses(loop, STEPS)
        bad = int(loop.bad_steps)
    if stage == ORDER[0]:
        reference += losses
    apart = max(abs(a - b) for a, b in zip(losses, reference or losses, strict=True))
    limit = AGREE[precision]
    figures = {"losses": losses, "from_stage_1": apart, "seconds": round(time.perf_counter() - started, 1)}
    why = ""
    if bad or not all(map(math.isfinite, losses)):
        why = f"{bad} steps were not taken, losses {losses}"
    elif losses[-1] >= losses[0]:
        why = "the loss did not fall"
    elif not apart <= limit:
        why = f"losses differ from those of ZeRO-1 by {apart:.1e}, more than {limit:.0e}"
    return Finding(f"ZeRO-{stage}, {precision}", FAILED if why else PASSED, figures, why)


def _search_scale(bench: Bench, stage: int) -> Finding:
    """Start from a scale that must overflow: it has to fall, step by step, without ending the run."""
    start = 24
    fp16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": start, "hysteresis": 1}}
    with training.trainer(bench, training.fields(bench), training.settings(stage, "fp16", **fp16)) as loop:
        taken = [bool(loop.train_step().taken) for _ in range(16)]
        scale = _scale(loop.session.engine.optimizer)
        bad = int(loop.bad_steps)
    figures: dict[str, Any] = {"taken": sum(taken), "first_taken": taken.index(True) if any(taken) else None}
    figures |= {"scale": scale, "bad_steps": bad}
    why = ""
    if not scale < 2**start:
        why = f"the loss scale stayed at {scale:g}"
    elif not taken[-1]:
        why = f"after 16 steps the loss scale of {scale:g} still overflows"
    elif bad:
        why = f"the search of the loss scale counted as {bad} bad steps"
    return Finding(f"ZeRO-{stage}, fp16", FAILED if why else PASSED, figures, why)


def _scale(optimizer: Any) -> float:
    """The loss scale, under the name that the stage's optimizer has for it."""
    for name in ("loss_scale", "cur_scale"):
        if hasattr(optimizer, name):
            return float(getattr(optimizer, name))
    return float(optimizer.loss_scaler.cur_scale)

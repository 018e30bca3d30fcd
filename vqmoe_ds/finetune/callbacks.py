"""Callbacks of a fine-tuning: early stop, and the report of a finished run on its best weights."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from vqmoe_ds.checkpoint.io.store import read_best
from vqmoe_ds.checkpoint.resume.restore import whole_shapes
from vqmoe_ds.checkpoint.resume.session import load
from vqmoe_ds.evaluation.plots import draw_usage, drawing, plot_loss, save
from vqmoe_ds.evaluation.routing import RoutingHealth
from vqmoe_ds.models.session import Session
from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.files import write_json
from vqmoe_ds.runtime.ranks import from_first
from vqmoe_ds.train.callbacks import MetricsFile, parameter_counts
from vqmoe_ds.train.job import Job
from vqmoe_ds.train.loop import Callback, StepResult, Trainer


class EarlyStop(Callback):
    """Ends a run after ``patience`` validations in a row without a new best loss; 0: never.

    Earlier validations are read from the metrics, so that a resumed run stops where it would have stopped.
    """

    def __init__(self, console: Console, file: MetricsFile, patience: int) -> None:
        self.console, self.file, self.patience = console, file, patience

    def on_start(self, trainer: Trainer) -> None:
        self._judge(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.last_validation is not None and trainer.last_validation[0] == result.step:
            self._judge(trainer)

    def _judge(self, trainer: Trainer) -> None:
        losses = [row["validation_loss"] for row in self.file.rows if "validation_loss" in row]  # rank 0 alone has them
        # NaN is neither less nor more than anything: what min gives would depend on its place.
        numbers = [loss if math.isfinite(loss) else math.inf for loss in losses]
        since = len(numbers) - 1 - numbers.index(min(numbers)) if numbers else 0
        # A collective, entered whatever this rank has counted: ranks that left the loop at other steps would hang.
        if trainer.session.on_any_rank(bool(self.patience) and since >= self.patience):
            trainer.done = True
            self.console.say(f"step {trainer.step}: no better validation in {self.patience}; training ends")


Finish = Callable[[Session], tuple[dict[str, Any], str]]
"""Function of a session with its best weights: gives part of the summary, and a line for the user."""


class BestReport(Callback):
    """Writes ``summary.json`` and figures of the checkpoint that validated best, at the end of a finished run.

    Args:
        finish: gives the task's part; all ranks call it.
        facts: of the data, for the summary.
        target: unit that a loss is per.
    """

    def __init__(
        self, job: Job, file: MetricsFile, health: RoutingHealth, finish: Finish, facts: dict[str, Any], target: str
    ) -> None:
        self.job, self.file, self.health, self.finish = job, file, health, finish
        self.facts, self.target = facts, target
        self._started = time.time()

    def on_end(self, trainer: Trainer) -> None:
        if trainer.stop_reason is not None:
            return
        console, session = self.job.console, trainer.session
        console.close_progress()
        # The weights in the session may go: Checkpoints, whose on_end came before, has saved and sealed them. Rank 0
        # reads the mark for all, since loading is a collective of one tag.
        best = from_first(read_best(self.job.checkpoints)[0])
        best_step = trainer.step if best is None else load(session, self.job.checkpoints / best)
        console.say(f"the weights of step {best_step} validated best; scoring them on all that is held out")
        found, line = self.finish(session)
        if session.place.rank == 0:
            tag = trainer.last_checkpoint if best is None else str(self.job.checkpoints / best)
            self._write(trainer, {"best_step": best_step, "checkpoint": tag, **found})
        console.say(f"best at step {best_step}: {line}")
        console.say(f"everything is in {self.job.run_dir} (start with summary.json)")

    def _write(self, trainer: Trainer, found: dict[str, Any]) -> None:
        run, folder = trainer.session.config.run, self.job.run_dir
        rates = [row["tokens_per_second"] for row in self.file.rows if "tokens_per_second" in row]
        validations = [row for row in self.file.rows if "validation_loss" in row]
        summary = {
            **found,
            **self.facts,
            "router": run.moe.router,
            "seed": run.train.seed,
            "steps": trainer.step,
            "bad_steps": trainer.bad_steps,
            "validations": [{k: v for k, v in row.items() if v is not None} for row in validations],
            "tokens_per_second": round(statistics.median(rates)) if rates else None,
            "seconds": round(time.time() - self._started, 1),
            "parameters": {**parameter_counts(trainer), "learning": _learning(trainer)},
            "layout": trainer.session.config.layout(),
            "finetune": run.finetune.model_dump(mode="json"),
        }
        with drawing(self.job.console.say):
            plot_loss(folder / "loss.png", self.file.rows, self.target, run.finetune.task or "")
            if trainer.session.model.moe_layers() and self.health.last_counts_LN.numel():
                save(draw_usage(self.health.last_counts_LN, self.health.last_usage_LK), folder / "usage.png")
        # Last, for it marks the run as finished.
        write_json(folder / "summary.json", summary)


def _learning(trainer: Trainer) -> int:
    """Parameters that learn, experts of all ranks included."""
    model = trainer.session.model
    shapes = whole_shapes(model, trainer.session.config.ep_size)
    return sum(math.prod(shapes[name]) for name, param in model.named_parameters() if param.requires_grad)

"""Callbacks of the loop: metrics, validation, checkpoints, signals, and the final report."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from vqmoe_ds.checkpoint.figures import sizes
from vqmoe_ds.checkpoint.io.store import forget_best_after, read_best, tag_name, write_best
from vqmoe_ds.checkpoint.resume.restore import whole_shapes
from vqmoe_ds.checkpoint.resume.sealing import Sealing
from vqmoe_ds.checkpoint.resume.session import begin_save
from vqmoe_ds.data.batches import Windows
from vqmoe_ds.data.training_data import TrainingData
from vqmoe_ds.evaluation.perplexity import bits_per_byte, validate
from vqmoe_ds.evaluation.plots import draw_usage, drawing, plot_loss, save
from vqmoe_ds.evaluation.routing import RoutingHealth
from vqmoe_ds.evaluation.sample import sample_tokens
from vqmoe_ds.models.session import Session
from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.errors import TrainingHalted
from vqmoe_ds.runtime.files import write_atomically, write_json
from vqmoe_ds.runtime.stopping import STOP, Interrupted
from vqmoe_ds.train.health import CommunicationMeter, health_line
from vqmoe_ds.train.loggers import Logger, scalars
from vqmoe_ds.train.loop import Callback, StepResult, Trainer

PATIENCE = 10.0
"""Seconds between two lines to the user, at most."""


class MetricsFile:
    """``metrics.jsonl`` and the loggers beside it, on rank 0; on resume, rows past the checkpoint are dropped."""

    def __init__(self, run_dir: Path, rank: int, resumed_step: int, loggers: Sequence[Logger]) -> None:
        self.path, self.writing, self.loggers = run_dir / "metrics.jsonl", rank == 0, loggers
        self.rows: list[dict[str, Any]] = []
        if not self.writing:
            return
        if self.path.exists():
            self.rows = [row for row in _read_rows(self.path) if row["step"] <= resumed_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers and per-layer lists also go to the loggers."""
        if not self.writing:
            return
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that presupposes it
        for logger in self.loggers:
            logger.write(scalars(row), row["step"])

    def note(self, name: str, text: str, step: int) -> None:
        """Hand a text, in Markdown, to the loggers."""
        for logger in self.loggers:
            logger.note(name, text, step)

    def close(self, code: int) -> None:
        """End the loggers' sessions; ``code`` is the exit code of the run."""
        for logger in self.loggers:
            logger.close(code)


class Metrics(Callback):
    """Every ``log_every`` steps: a row of metrics, the progress line, and the proof that codebooks are in step."""

    def __init__(self, console: Console, file: MetricsFile, health: RoutingHealth) -> None:
        self.console, self.file, self.health = console, file, health
        self.meter = CommunicationMeter(health.session.place, health.session.device)
        self._results: list[StepResult] = []

    def on_start(self, trainer: Trainer) -> None:
        # The routes that the first row's fluctuation is measured against.
        self.health.measure()

    def before_step(self, trainer: Trainer) -> None:
        # Within steps only: the collectives of validations and saves would count as waiting.
        self.meter.counting = True

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.meter.counting = False
        config = trainer.session.config.run
        if result.searching:
            self.console.say(f"step {result.step}: fp16 overflow; skipped, and the loss scale falls")
        elif not result.taken:
            self.console.say(f"step {result.step}: loss or gradient is NaN or infinite; the step was skipped")
        self._results.append(result)
        if result.step % config.run.log_every and result.step != trainer.total_steps:
            return
        # On every rank, though rank 0 alone writes it: its figures are made by collectives.
        row = self._row(trainer, result)
        self.file.write(row)
        trainer.last_metrics = row
        left = (trainer.total_steps - result.step) * sum(r.seconds for r in self._results) / len(self._results)
        self._results = []
        self.console.progress(result.step, trainer.total_steps, _line(row, trainer.total_steps, left))
        if "slowest_rank" in row:
            self.console.say(health_line(row))
        sync = trainer.session.sync
        # All ranks get the same answer, so that all raise.
        if not sync.in_step():
            raise TrainingHalted(
                f"codebooks or routers of the ranks differ at step {result.step}; training stopped before they diverge"
            )

    def _row(self, trainer: Trainer, result: StepResult) -> dict[str, Any]:
        # A skipped step with a NaN loss would make the mean of all others NaN.
        finite = [r for r in self._results if math.isfinite(r.loss)]
        loss = sum(r.loss for r in finite) / len(finite) if finite else None
        sizes = [r.bytes_per_token for r in finite if r.bytes_per_token is not None]
        norm = trainer.session.engine.get_global_grad_norm()
        tokens = sum(r.tokens for r in self._results)
        seconds = max(sum(r.seconds for r in self._results), 1e-9)
        row: dict[str, Any] = {
            "step": result.step,
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, sum(sizes) / len(sizes) if sizes else None),
            "aux_loss": result.aux_loss if finite else None,
            "learning_rate": result.learning_rate,
            "grad_norm": None if norm is None else float(norm),
            "tokens_per_second": tokens / seconds,
            "data_share": round(sum(r.data_seconds for r in self._results) / seconds, 5),
            "epoch": trainer.batches.epoch(trainer.samples),
            "bad_steps": trainer.bad_steps,
            "save_seconds": trainer.save_seconds,
        }
        return {**row, **self.meter.measure(seconds, len(self._results)), **self.health.measure()}


class Scored(Protocol):
    """Result of a validation."""

    @property
    def loss(self) -> float: ...

    def row(self) -> dict[str, Any]:
        """The figures under the names of metrics."""


class Validation(Callback):
    """Validation on part of what is held out every ``eval_every`` steps.

    Args:
        measure: scores a session with at most a number of batches.
        at_ends: also before the first step and after the last.
    """

    def __init__(
        self, console: Console, file: MetricsFile, measure: Callable[[Session, int], Scored], at_ends: bool = False
    ) -> None:
        self.console, self.file, self.measure, self.at_ends = console, file, measure, at_ends

    def on_start(self, trainer: Trainer) -> None:
        # On a resume, the one that a request to stop cut short; rank 0 alone has the rows.
        if self._due(trainer) and trainer.session.on_any_rank(self.file.writing and not self._done(trainer.step)):
            self._validate(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self._due(trainer):
            self._validate(trainer)

    def _due(self, trainer: Trainer) -> bool:
        every = trainer.session.config.run.run.eval_every
        if trainer.step in (0, trainer.total_steps):
            return self.at_ends
        return bool(every) and trainer.step % every == 0

    def _done(self, step: int) -> bool:
        return any(row["step"] == step and "validation_loss" in row for row in self.file.rows)

    def _validate(self, trainer: Trainer) -> None:
        try:
            score = self.measure(trainer.session, trainer.session.config.run.run.eval_batches)
        except Interrupted:
            # Raised on all ranks together; Signals, later in this round of callbacks, ends the run.
            trainer.stop_asked = True
            return
        trainer.last_validation = (trainer.step, score.loss)
        self.file.write({"step": trainer.step, **score.row()})
        self.console.say(f"step {trainer.step}: validation {score}")


class Checkpoints(Callback):
    """Saves every ``save_every`` steps, at the best validation, at the end, and when training stops early.

    Training waits until the files are written, not until they are sealed.
    """

    def __init__(self, console: Console, folder: Path) -> None:
        self.console, self.folder = console, folder
        self._run_folder = _identity(folder.parent)
        self._saved_step = -1
        self._sealing: Sealing | None = None

    def on_start(self, trainer: Trainer) -> None:
        # The tag that is resumed must not be written again where the run takes no further step.
        self._saved_step = trainer.step
        first, tag = trainer.session.place.rank == 0, tag_name(trainer.step)
        if first:
            forget_best_after(self.folder, trainer.step)
        if not (trainer.session.config.run.run.keep_best and self._is_best(trainer)):
            return
        if trainer.session.on_any_rank(first and (self.folder / tag).exists()):  # the one that is resumed
            if first:
                write_best(self.folder, tag, _last_loss(trainer))
        else:  # weights that no step of this run has changed yet may stay the best
            self._save(trainer, best=True)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        output = trainer.session.config.run.run
        # Ranks may find it done at different steps: finish waits for this rank's thread only.
        if self._sealing is not None and self._sealing.done_within(0):
            self._finish(trainer)
        if trainer.bad_in_a_row:
            self._finish(trainer)  # this may be the end
            return
        best = output.keep_best and self._is_best(trainer)
        if best or (output.save_every and result.step % output.save_every == 0):
            self._save(trainer, best)

    def on_end(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.step:
            self._save(trainer)
        self._finish(trainer)
        if trainer.stop_reason is not None:
            self.console.say(
                f"stopped by {trainer.stop_reason} after step {trainer.step}; saved {trainer.last_checkpoint}"
            )

    def _is_best(self, trainer: Trainer) -> bool:
        """Whether this step's validation beats all before, as rank 0 sees it, which keeps the best loss."""
        step, loss = trainer.last_validation or (-1, math.inf)
        if step != trainer.step:
            return False
        self._finish(trainer)  # which may write the mark
        return trainer.session.on_any_rank(trainer.session.place.rank == 0 and loss < read_best(self.folder)[1])

    def _save(self, trainer: Trainer, best: bool = False) -> None:
        started, output = time.perf_counter(), trainer.session.config.run.run
        self._finish(trainer)
        # DeepSpeed would make a folder that was moved anew, and split the run over two places.
        if trainer.session.on_any_rank(_identity(self.folder.parent) != self._run_folder):
            raise FileNotFoundError(errno.ENOENT, "it was moved or deleted", str(self.folder.parent))
        tag, loss = tag_name(trainer.step), _last_loss(trainer)
        self._sealing = begin_save(
            trainer.session,
            self.folder,
            trainer.step,
            output.keep_last,
            trainer.samples,
            output.keep_every,
            # Once it is sealed: the mark must not name a checkpoint that a kill has left half-written.
            on_sealed=functools.partial(write_best, self.folder, tag, loss) if best else None,
        )
        self._saved_step = trainer.step
        trainer.save_seconds = round(time.perf_counter() - started, 3)

    def _finish(self, trainer: Trainer) -> None:
        if self._sealing is not None:
            while not self._sealing.done_within(PATIENCE):
                self.console.say(f"{self._sealing.tag.name} is being flushed to disk and checked")
            self._sealing.finish()
            trainer.last_checkpoint = str(self._sealing.tag)
            if self._sealing.note is not None:
                self.console.say(self._sealing.note)
            self._sealing = None


class Signals(Callback):
    """Defers a request to stop to the end of the step, which is then saved (exit code ``TRY_AGAIN``).

    Comes after ``Checkpoints``: what follows at the end of a run can be done again.
    """

    @property
    def asks_to_stop(self) -> bool:  # type: ignore[override]
        return STOP.reason is not None

    def on_start(self, trainer: Trainer) -> None:
        STOP.defer()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.stop_asked:
            trainer.stop_reason = STOP.reason or "a request to another rank"

    def on_end(self, trainer: Trainer) -> None:
        if trainer.stop_reason is None:
            STOP.act()


class FinalReport(Callback):
    """Makes the full validation, ``summary.json``, figures and a text sample, at the end of a finished run."""

    things, target = "windows", "token"
    """What is held out, and the unit that a loss is per."""

    def __init__(
        self,
        console: Console,
        file: MetricsFile,
        data: TrainingData,
        windows: Windows,
        health: RoutingHealth,
        run_dir: Path,
    ) -> None:
        self.console, self.file, self.data, self.windows = console, file, data, windows
        self.health, self.run_dir = health, run_dir
        self._started = time.time()
        self._first_step = 0

    def on_start(self, trainer: Trainer) -> None:
        self._started, self._first_step = time.time(), trainer.step

    def on_end(self, trainer: Trainer) -> None:
        if trainer.stop_reason is not None:
            return
        self.console.close_progress()
        session, output = trainer.session, trainer.session.config.run.run
        most = min(output.final_eval_windows or len(self.windows), len(self.windows))
        told = f"all {most}" if most == len(self.windows) else f"{most} of {len(self.windows)}"
        score = self._validate(session, most)
        row = {"step": trainer.step, **score.row()}
        if row not in self.file.rows:  # a kill came after it
            self.file.write(row)
        text = self._sample(trainer, output.sample_tokens)
        if text:
            self.file.note("sample", f"```\n{text}\n```", trainer.step)
        # The other ranks are past it: nothing in _write may be a collective.
        if session.place.rank == 0:
            self._write(trainer, score, text)
        self.console.say(f"validation {score} on {told} held-out {self.things}")
        if text:
            self.console.say(f"--- sample ---\n{text}\n--------------")
        found = [name for name in ("summary.json", "loss.png", "usage.png") if (self.run_dir / name).exists()]
        self.console.say(f"everything is in {self.run_dir} (start with {', '.join(found)})")

    def _validate(self, session: Session, most: int) -> Scored:
        """Score ``most`` of what is held out."""
        return validate(session, self.windows, most, self._tell_at_times())

    def _about(self, score: Any) -> dict[str, Any]:
        """The score's part of the summary; called on rank 0."""
        figures: dict[str, Any] = score.row()
        return figures

    def _tell_at_times(self) -> Callable[[int, int], None]:
        """A function that says how far the closing validation is, every ten seconds."""
        last = time.monotonic()

        def tell(done: int, count: int) -> None:
            nonlocal last
            if time.monotonic() - last > PATIENCE:
                last = time.monotonic()
                self.console.say(f"closing validation: {done:,} of {count:,} held-out windows")

        return tell

    def _sample(self, trainer: Trainer, length: int) -> str:
        prompt, size = self.data.encode("The "), self.data.vocab_size
        if not length or not prompt or size is None or trainer.session.config.run.looks_ahead is not None:
            return ""
        return self.data.decode(sample_tokens(trainer.session, prompt, length, size))

    def _write(self, trainer: Trainer, score: Scored, text: str) -> None:
        session = trainer.session
        summary = {
            **self._about(score),
            "steps": trainer.step,
            "bad_steps": trainer.bad_steps,
            "seconds": round(time.time() - self._started, 1),
            "steps_this_session": trainer.step - self._first_step,
            "tokens": trainer.samples * session.config.run.model.sequence_length,
            "parameters": parameter_counts(trainer),
            "layout": session.config.layout(),
            "checkpoint": trainer.last_checkpoint,
            "last_metrics": trainer.last_metrics,
            "sample": text,
        }
        with drawing(self.console.say):
            plot_loss(self.run_dir / "loss.png", self.file.rows, self.target, self.data.summary())
            if session.model.moe_layers():
                save(draw_usage(self.health.last_counts_LN, self.health.last_usage_LK), self.run_dir / "usage.png")
        # Last, for it says that the run is finished.
        write_json(self.run_dir / "summary.json", summary)


def _last_loss(trainer: Trainer) -> float:
    return math.inf if trainer.last_validation is None else trainer.last_validation[1]


def _identity(folder: Path) -> tuple[int, int] | None:
    """Identity that a folder keeps when it is renamed, and that a new one of its name lacks; None: no folder."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def parameter_counts(trainer: Trainer) -> dict[str, int]:
    """Stored and active (used per token) parameters of the whole model, experts of other ranks included."""
    config = trainer.session.config
    counts = sizes(whole_shapes(trainer.session.model, config.ep_size), config.run)
    return {"stored": counts["stored"], "active": counts["active"]}


def _line(row: dict[str, Any], total_steps: int, seconds_left: float) -> str:
    minutes, seconds = divmod(int(seconds_left), 60)
    loss = "loss   nan" if row["loss"] is None else f"loss {row['loss']:.4f}"
    if row["bits_per_byte"] is not None:
        loss += f" ({row['bits_per_byte']:.4f} bits/byte)"
    return (
        f"step {row['step']}/{total_steps} | {loss} | lr {row['learning_rate']:.2e} | "
        f"{row['tokens_per_second']:.0f} tokens/s | {minutes}:{seconds:02d} left"
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a line cut short by a kill
            continue
    return rows

"""What happens around the loop: metrics, validation, checkpoints, signals, and the final report."""

from __future__ import annotations

import functools
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from vqmoe_ds.checkpoint.figures import sizes
from vqmoe_ds.checkpoint.restore import whole_shapes
from vqmoe_ds.checkpoint.sealing import Sealing
from vqmoe_ds.checkpoint.session import begin_save
from vqmoe_ds.checkpoint.store import forget_best_after, read_best, tag_name, write_best
from vqmoe_ds.data.batches import Windows
from vqmoe_ds.data.training_data import TrainingData
from vqmoe_ds.errors import TrainingHalted
from vqmoe_ds.evaluation.perplexity import Score, bits_per_byte, validate
from vqmoe_ds.evaluation.plots import plot_loss, plot_usage
from vqmoe_ds.evaluation.routing import RoutingHealth
from vqmoe_ds.evaluation.sample import sample_tokens
from vqmoe_ds.files import write_atomically
from vqmoe_ds.moe.routers import why_not_causal
from vqmoe_ds.train.console import Console
from vqmoe_ds.train.engine import Session
from vqmoe_ds.train.health import CommunicationMeter, health_line
from vqmoe_ds.train.loop import Callback, StepResult, Trainer


class MetricsFile:
    """``metrics.jsonl`` and TensorBoard events, written by rank 0; on resume, rows past the checkpoint are dropped."""

    def __init__(self, run_dir: Path, rank: int, resumed_step: int) -> None:
        self.path, self.writing = run_dir / "metrics.jsonl", rank == 0
        self.rows: list[dict[str, Any]] = []
        self._board: Any = None
        if not self.writing:
            return
        if self.path.exists():
            self.rows = [row for row in _read_rows(self.path) if row["step"] <= resumed_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers and per-layer lists also go to TensorBoard."""
        if not self.writing:
            return
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, list):
                for layer, entry in enumerate(value):
                    self._board.add_scalar(f"{name}/layer{layer}", entry, row["step"])
            elif isinstance(value, (int, float)) and name != "step":
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class Metrics(Callback):
    """Every ``log_every`` steps: a row of metrics, the progress line, and the proof that codebooks are in step."""

    def __init__(self, console: Console, file: MetricsFile, health: RoutingHealth) -> None:
        self.console, self.file, self.health = console, file, health
        self.meter = CommunicationMeter(health.session.place, health.session.device)
        self._results: list[StepResult] = []

    def on_start(self, trainer: Trainer) -> None:
        self.health.measure()

    def before_step(self, trainer: Trainer) -> None:
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
        row = self._row(trainer, result)
        self.file.write(row)
        trainer.last_metrics = row
        left = (trainer.total_steps - result.step) * sum(r.seconds for r in self._results) / len(self._results)
        self._results = []
        self.console.progress(result.step, trainer.total_steps, _line(row, trainer.total_steps, left))
        if "slowest_rank" in row:
            self.console.say(health_line(row))
        sync = trainer.session.sync
        if sync is not None and not sync.in_step():
            raise TrainingHalted(
                f"codebooks or routers of the ranks differ at step {result.step}; training stopped before they diverge"
            )

    def _row(self, trainer: Trainer, result: StepResult) -> dict[str, Any]:
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
    """What a validation found."""

    @property
    def loss(self) -> float: ...

    def row(self) -> dict[str, Any]:
        """As metrics name it."""


class Validation(Callback):
    """Validation on part of what is held out every ``eval_every`` steps.

    Args:
        measure: of a session and the number of batches it may take.
        at_ends: also before the first step and after the last.
    """

    def __init__(
        self, console: Console, file: MetricsFile, measure: Callable[[Session, int], Scored], at_ends: bool = False
    ) -> None:
        self.console, self.file, self.measure, self.at_ends = console, file, measure, at_ends

    def on_start(self, trainer: Trainer) -> None:
        if self.at_ends and trainer.step == 0:
            self._validate(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        every = trainer.session.config.run.run.eval_every
        last = result.step == trainer.total_steps
        if self.at_ends if last else every and result.step % every == 0:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        score = self.measure(trainer.session, trainer.session.config.run.run.eval_batches)
        trainer.last_validation = (trainer.step, score.loss)
        self.file.write({"step": trainer.step, **score.row()})
        self.console.say(f"step {trainer.step}: validation {score}")


class Checkpoints(Callback):
    """Saves every ``save_every`` steps, at the best validation, at the end, and when training stops early.

    Training waits until the files are written, not until they are sealed.
    """

    def __init__(self, console: Console, folder: Path) -> None:
        self.console, self.folder = console, folder
        self._saved_step = -1
        self._sealing: Sealing | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._saved_step = trainer.step
        if trainer.session.place.rank == 0:
            forget_best_after(self.folder, trainer.step)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        output = trainer.session.config.run.run
        if self._sealing is not None:
            self._sealing.check()
        if trainer.bad_in_a_row:
            self._finish()  # this may be the end
            return
        best = output.keep_best and self._is_best(trainer)
        if best or (output.save_every and result.step % output.save_every == 0):
            self._save(trainer, best)

    def on_end(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.step:
            self._save(trainer)
        self._finish()
        if trainer.stop_reason is not None:
            self.console.say(
                f"stopped by {trainer.stop_reason} after step {trainer.step}; saved {trainer.last_checkpoint}"
            )

    def _is_best(self, trainer: Trainer) -> bool:
        """Whether this step's validation beats all before; as rank 0, who keeps the mark, sees it."""
        step, loss = trainer.last_validation or (-1, math.inf)
        if step != trainer.step:
            return False
        self._finish()  # which may write the mark
        better = trainer.session.place.rank == 0 and loss < read_best(self.folder)[1]
        return float(trainer.session.sum_over_ranks(torch.tensor([float(better)], device=trainer.session.device))) > 0

    def _save(self, trainer: Trainer, best: bool = False) -> None:
        started, output = time.perf_counter(), trainer.session.config.run.run
        self._finish()
        tag, loss = tag_name(trainer.step), trainer.last_validation[1] if trainer.last_validation else math.inf
        self._sealing = begin_save(
            *(trainer.session, self.folder, trainer.step, output.keep_last, trainer.samples, output.keep_every),
            on_sealed=functools.partial(write_best, self.folder, tag, loss) if best else None,
        )
        trainer.last_checkpoint, self._saved_step = str(self.folder / tag), trainer.step
        trainer.save_seconds = round(time.perf_counter() - started, 3)

    def _finish(self) -> None:
        if self._sealing is not None:
            self._sealing.finish()
            if self._sealing.note is not None:
                self.console.say(self._sealing.note)
            self._sealing = None


class Signals(Callback):
    """SIGTERM and SIGUSR1 on any rank: finish the step, save, and stop (exit code ``TRY_AGAIN``)."""

    def __init__(self) -> None:
        self._received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._received, self.asks_to_stop = signal.Signals(number).name, True

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.stop_asked:
            trainer.stop_reason = self._received or "a signal to another rank"


class FinalReport(Callback):
    """At the end of a finished run: full validation, ``summary.json``, figures and a text sample."""

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
        score = validate(session, self.windows)
        self.file.write({"step": trainer.step, **score.row()})
        text = self._sample(trainer, output.sample_tokens)
        if session.place.rank == 0:
            self._write(trainer, score, text)
        self.console.say(f"validation {score} on all {len(self.windows)} held-out windows")
        if text:
            self.console.say(f"--- sample ---\n{text}\n--------------")
        self.console.say(f"everything is in {self.run_dir} (start with summary.json, loss.png, usage.png)")

    def _sample(self, trainer: Trainer, length: int) -> str:
        prompt, size = self.data.encode("The "), self.data.vocab_size
        if not length or not prompt or size is None or why_not_causal(trainer.session.config.run):
            return ""
        return self.data.decode(sample_tokens(trainer.session, prompt, length, size))

    def _write(self, trainer: Trainer, score: Score, text: str) -> None:
        session = trainer.session
        summary = {
            **score.row(),
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
        write_atomically(self.run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
        plot_loss(self.run_dir / "loss.png", self.file.rows)
        if session.model.moe_layers():
            plot_usage(self.run_dir / "usage.png", self.health.last_counts_LN, self.health.last_usage_LK)


def parameter_counts(trainer: Trainer) -> dict[str, int]:
    """Stored and active (used by one token) parameters of the whole model, experts of other ranks included."""
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
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a line cut short by a kill
            continue
    return rows

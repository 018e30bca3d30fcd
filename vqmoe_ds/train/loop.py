"""The training loop: batches in, optimizer steps out; everything else is a callback."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.data.batches import MASKED, Batch, Batches
from vqmoe_ds.errors import TrainingHalted
from vqmoe_ds.train.engine import Session, apply_step, set_learning_rate
from vqmoe_ds.train.schedule import learning_rate


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, averaged over all ranks and micro-batches."""

    step: int
    """Steps finished, this one included."""
    loss: float
    """Language-model loss in nats a token, or of a classifier in nats a text."""
    aux_loss: float
    learning_rate: float
    taken: bool
    """False where a NaN or infinite loss or gradient made the step a no-op."""
    seconds: float
    data_seconds: float
    """Part of ``seconds`` in which this rank read its batches."""
    bytes_per_token: float | None
    """UTF-8 bytes a target stands for, on average; None where the tokenizer is unknown, or targets are labels."""
    tokens: int
    """Tokens read on all ranks, padding not counted."""


class Callback:
    """Hooks of the loop; all ranks call them in the same order, so they may communicate."""

    def on_start(self, trainer: Trainer) -> None: ...

    def before_step(self, trainer: Trainer) -> None: ...

    def after_step(self, trainer: Trainer, result: StepResult) -> None: ...

    def on_end(self, trainer: Trainer) -> None: ...


@dataclass
class Trainer:
    """Runs ``config.run.train.steps`` optimizer steps from ``step`` on.

    Args:
        session: engine, model and codebooks.
        batches: training data, a pure function of the samples consumed.
        callbacks: called in order.
        step: steps already finished (after a resume).
        resumed_at: step and samples consumed of the checkpoint, whose global batch may have been another.
    """

    session: Session
    batches: Batches
    callbacks: list[Callback]
    step: int = 0
    resumed_at: tuple[int, int] = (0, 0)
    bad_steps: int = 0
    bad_in_a_row: int = 0
    stop_reason: str | None = None
    """What cut the run short, to be resumed."""
    done: bool = False
    """Set by a callback: the run ends here as if it had taken all its steps."""
    last_checkpoint: str | None = None
    last_validation: tuple[int, float] | None = None
    """Step and loss of the last interim validation."""
    save_seconds: float | None = None
    """How long the last checkpoint kept training waiting."""
    last_metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        return self.session.config.run.train.steps

    @property
    def samples(self) -> int:
        """Samples consumed: where the data goes on."""
        step, samples = self.resumed_at
        return samples + (self.step - step) * self.session.config.run.train.batch_size

    def run(self) -> None:
        """Train to the end, or until a callback sets ``done`` or ``stop_reason``."""
        for callback in self.callbacks:
            callback.on_start(self)
        self.session.engine.train()
        while self.step < self.total_steps and not self.done and self.stop_reason is None:
            for callback in self.callbacks:
                callback.before_step(self)
            result = self.train_step()
            for callback in self.callbacks:
                callback.after_step(self, result)
            self._give_up_if_hopeless()
        for callback in self.callbacks:
            callback.on_end(self)

    def train_step(self) -> StepResult:
        """All micro-batches of one optimizer step, the step itself, and that of codebooks or routers."""
        started = time.perf_counter()
        session, train = self.session, self.session.config.run.train
        engine, rounds = session.engine, session.config.accumulation_steps
        rate = learning_rate(self.step, train)
        if "scheduler" not in session.config.deepspeed:
            set_learning_rate(engine, rate)
        batches = self.batches.micro_batches(
            self.samples, session.place.rank, session.place.world_size, session.config.micro_batch
        )
        data_seconds = time.perf_counter() - started
        weights, bytes_per_token = self._weigh(batches)
        losses, taken = [], True
        for micro, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            lm_loss, aux_loss = engine(self._tensor(batch.inputs_BS), self._tensor(batch.targets_BS))
            if weight is not None:
                lm_loss = lm_loss * weight
            engine.backward(lm_loss + aux_loss)
            losses.append([float(lm_loss.detach()), float(aux_loss.detach()), batch.tokens])
            if micro < rounds - 1:
                engine.step()
        mean = [sum(column) / rounds for column in zip(*losses, strict=True)]
        loss, aux, tokens = session.mean_over_ranks(mean)
        tokens *= rounds * session.place.world_size
        taken = apply_step(engine, math.isfinite(loss + aux)) and math.isfinite(loss + aux)
        self._step_routers(taken)
        self.step += 1
        self.bad_steps += not taken
        self.bad_in_a_row = 0 if taken else self.bad_in_a_row + 1
        seconds = time.perf_counter() - started
        return StepResult(self.step, loss, aux, rate, taken, seconds, data_seconds, bytes_per_token, round(tokens))

    def _weigh(self, batches: list[Batch]) -> tuple[list[float | None], float | None]:
        """Weight of each micro-batch's mean loss in the mean over all targets of the step; bytes a target.

        The engine takes the mean over all micro-batches of all ranks. Where nothing is masked that is the mean over
        all targets, and there is nothing to do; else micro-batches count by their unmasked targets.
        """
        if not self.batches.masked:
            return [None] * len(batches), None if batches[0].bytes_B is None else 1.0
        counts = [int((batch.targets_BS != MASKED).sum()) for batch in batches]
        known = all(batch.bytes_B is not None for batch in batches)
        bytes_here = sum(int(batch.bytes_B.sum()) for batch in batches if batch.bytes_B is not None)
        here = torch.tensor([sum(counts), bytes_here], dtype=torch.float64, device=self.session.device)
        targets, target_bytes = (float(v) for v in self.session.sum_over_ranks(here))
        micro_batches = len(batches) * self.session.place.world_size
        weights: list[float | None] = [count * micro_batches / max(targets, 1.0) for count in counts]
        return weights, target_bytes / max(targets, 1.0) if known else None

    def _step_routers(self, taken: bool) -> None:
        session = self.session
        if session.sync is None:
            return
        if not taken:
            session.sync.skip()
            return
        session.sync.step()
        source = session.model.source
        if source is not None and source.follows:
            source.follow(full_embedding(session))

    def _tensor(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids).to(self.session.device).contiguous()

    def _give_up_if_hopeless(self) -> None:
        limit = self.session.config.run.train.max_bad_steps
        if self.bad_in_a_row >= limit:
            where = (
                f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "none was saved yet"
            )
            raise TrainingHalted(
                f"{limit} steps in a row up to step {self.step} had a NaN or infinite loss; training stopped, {where}; "
                "lower train.learning_rate or look at the data"
            )


def full_embedding(session: Session) -> Tensor:
    """The embedding table, gathered where ZeRO-3 holds it in pieces."""
    weight = session.model.embed.weight
    if not hasattr(weight, "ds_id"):
        return weight.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()

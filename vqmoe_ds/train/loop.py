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
from vqmoe_ds.models.session import Session
from vqmoe_ds.runtime.errors import TrainingHalted
from vqmoe_ds.train.engine import (
    apply_step,
    checks_gradients,
    gradients_bad,
    searches_loss_scale,
    set_learning_rate,
)
from vqmoe_ds.train.schedule import learning_rate


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, averaged over all ranks and micro-batches."""

    step: int
    """Steps finished, this one included."""
    loss: float
    """Language-model loss in nats per token, or of a classifier in nats per text."""
    aux_loss: float
    learning_rate: float
    taken: bool
    """False where a NaN or infinite loss or gradient made the step a no-op."""
    searching: bool
    """Whether it was a no-op because fp16 looks for its loss scale, which is no sign of trouble."""
    seconds: float
    data_seconds: float
    """Part of ``seconds`` in which this rank read its batches."""
    bytes_per_token: float | None
    """UTF-8 bytes a target stands for, on average; None where the tokenizer is unknown, or targets are labels."""
    tokens: int
    """Tokens read on all ranks, padding not counted."""


class Callback:
    """Hooks of the loop; all ranks call them in the same order, so they may communicate."""

    asks_to_stop = False
    """Read once per step on every rank; where one asks, all learn of it (``Trainer.stop_asked``)."""

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
    stop_asked: bool = False
    """Whether a callback of any rank asked to stop when the last step's losses were averaged."""
    stop_reason: str | None = None
    """Reason why the run was cut short, to be resumed."""
    done: bool = False
    """Set by a callback: the run ends here as if it had taken all its steps."""
    last_checkpoint: str | None = None
    """Path of the last checkpoint that is sealed."""
    last_validation: tuple[int, float] | None = None
    """Step and loss of the last interim validation."""
    save_seconds: float | None = None
    """Seconds that the last checkpoint kept training waiting."""
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
            # After the callbacks: Checkpoints has sealed by now what the error names as the last good one.
            self._give_up_if_hopeless()
        for callback in self.callbacks:
            callback.on_end(self)

    def train_step(self) -> StepResult:
        """All micro-batches of one optimizer step, the step itself, and that of codebooks or routers.

        Losses stay on the device: one copy to the host per optimizer step brings them, with everything that decides
        whether the step counts and whether training goes on.
        """
        started = time.perf_counter()
        session, train = self.session, self.session.config.run.train
        # At every step and from its number alone: a resumed run needs no state of a schedule.
        if "scheduler" not in session.config.deepspeed:
            set_learning_rate(session.engine, learning_rate(self.step, train))
        rate = float(session.engine.optimizer.param_groups[0]["lr"])  # a scheduler of the JSON moves it after the step
        if session.model.bank is not None:
            # Read with codebook.learning_rate=0, at which codes move at the model's rate.
            session.model.bank.model_rate = rate
        batches = self.batches.micro_batches(
            self.samples, session.reader, session.config.readers, session.config.micro_batch
        )
        data_seconds = time.perf_counter() - started
        # From here to the end of the step every rank makes the same collectives in the same order, whatever its data.
        means = self._run_micro_batches(batches)
        if checks_gradients(session.engine):  # the engine would step whatever the gradients are
            means["bad"] = gradients_bad(session.engine)
        # One collective for all: in float64, as token counts pass the 2^24 that float32 holds exactly.
        reduced = session.mean_over_ranks(torch.stack([value.double() for value in means.values()]))
        # From sums over all ranks: one that went by its own loss might step alone, and the weights would part.
        if "bad" in means:
            mean = dict(zip(means, reduced.tolist(), strict=True))
            taken = apply_step(session.engine, math.isfinite(mean["loss"] + mean["aux"]) and mean["bad"] == 0)
        else:
            # ZeRO and fp16 drop a bad step by themselves: nothing has to be read on the host before it.
            taken = apply_step(session.engine, True)
            mean = dict(zip(means, reduced.tolist(), strict=True))
            taken = taken and math.isfinite(mean["loss"] + mean["aux"])
        self._step_routers(taken)
        return self._account(mean, taken, rate, started, data_seconds)

    def _run_micro_batches(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Forward and backward of this rank; what is to be averaged over ranks, as scalars on the device."""
        session, rounds = self.session, self.session.config.accumulation_steps
        engine, sums = session.engine, torch.zeros(2, dtype=torch.float64, device=self.session.device)
        weights, sizes = self._weigh(batches)
        for micro, batch in enumerate(batches):
            inputs_BS, targets_BS = session.tensor(batch.inputs_BS), session.tensor(batch.targets_BS)
            lm_loss, aux_loss = engine(inputs_BS, targets_BS, **session.documents_of(batch))
            if weights is not None:
                lm_loss = lm_loss * weights[micro].to(lm_loss.dtype)
            if micro == rounds - 1:
                session.sync.start()  # all statistics are in: their reduction runs beside backward
            # One backward for both: the engine divides them by the accumulation steps and averages over ranks alike.
            engine.backward(lm_loss + aux_loss)
            sums += torch.stack([lm_loss.detach(), aux_loss.detach()])
            # DeepSpeed only counts this micro-batch. The step at the boundary waits until the losses of all ranks are
            # summed (apply_step).
            if micro < rounds - 1:
                engine.step()
        # The wish to stop travels with the losses, so that all ranks leave after the same step.
        asked = any(callback.asks_to_stop for callback in self.callbacks)
        tokens, asked_to_stop = self.session.tensor(np.array([sum(b.tokens for b in batches), asked], dtype=np.float64))
        return {"loss": sums[0] / rounds, "aux": sums[1] / rounds, "tokens": tokens, "asked": asked_to_stop, **sizes}

    def _weigh(self, batches: list[Batch]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Weight of each micro-batch's mean loss in the mean over all targets of the step; targets and their bytes.

        The engine takes the mean over all micro-batches of all ranks. Where nothing is masked that is the mean over
        all targets, and there is nothing to do; else micro-batches count by their unmasked targets.
        """
        if not self.batches.masked:
            one = torch.ones((), dtype=torch.float64, device=self.session.device)
            # A target is a byte: the ratio is 1 on every rank, and no collective is needed to find it.
            return None, {} if batches[0].bytes_B is None else {"targets": one, "bytes": one}
        counts = np.array([(batch.targets_BS != MASKED).sum() for batch in batches])
        known = all(batch.bytes_B is not None for batch in batches)
        bytes_here = sum(int(batch.bytes_B.sum()) for batch in batches if batch.bytes_B is not None)
        here = self.session.tensor(np.array([counts.sum(), bytes_here, *counts], dtype=np.float64))
        # Before the forward passes: a micro-batch's weight needs the targets of all ranks. Ranks that share sequences
        # count the same ones, each as often as its losses count.
        targets, target_bytes = self.session.sum_over_ranks(here[:2])
        # With n targets of N in a micro-batch, R rounds and W ranks: w = n R W / N makes the engine's mean of w L over
        # all R W micro-batches the sum of n L / N.
        weights = here[2:] * (len(batches) * self.session.place.world_size) / targets.clamp_min(1.0)
        return weights, {"targets": targets, "bytes": target_bytes} if known else {"targets": targets}

    def _account(
        self, mean: dict[str, float], taken: bool, rate: float, started: float, data_seconds: float
    ) -> StepResult:
        """Count the step and give its result."""
        # Counted whether taken or not: the data goes on, and a resumed run has to pass the same batches.
        self.step += 1
        self.stop_asked = mean["asked"] > 0
        finite = math.isfinite(mean["loss"] + mean["aux"])
        searching = not taken and finite and searches_loss_scale(self.session.engine)
        bad = not taken and not searching
        self.bad_steps += bad
        self.bad_in_a_row = 0 if taken else self.bad_in_a_row + bad
        bytes_per_token = mean["bytes"] / max(mean["targets"], 1.0) if "bytes" in mean else None
        # Times readers, not ranks: ranks that share sequences were dealt the same batch.
        tokens = round(mean["tokens"] * self.session.config.readers)
        seconds = time.perf_counter() - started
        outcome = (self.step, mean["loss"], mean["aux"], rate, taken, searching)
        return StepResult(*outcome, seconds, data_seconds, bytes_per_token, tokens)

    def _step_routers(self, taken: bool) -> None:
        session = self.session
        # Codes follow the weights: a step that moved none leaves them too, and drops what it had gathered.
        if not taken:
            session.sync.skip()
            return
        session.sync.step()
        source = session.model.source
        if source is not None and source.follows:
            source.follow(full_embedding(session))

    def _give_up_if_hopeless(self) -> None:
        limit = self.session.config.run.train.max_bad_steps
        if self.bad_in_a_row >= limit:
            raise TrainingHalted(
                f"{limit} steps in a row up to step {self.step} had a NaN or infinite loss; training stopped, "
                f"{self.what_is_left()}; lower train.learning_rate or look at the data"
            )

    def what_is_left(self) -> str:
        """A clause for an error that ends training."""
        if self.last_checkpoint is None:
            return "none was saved yet"
        return f"the last good checkpoint is {self.last_checkpoint}"


def full_embedding(session: Session) -> Tensor:
    """The embedding table, gathered where ZeRO-3 holds it in pieces."""
    weight = session.model.embed.weight
    if not hasattr(weight, "ds_id"):
        return weight.detach()
    import deepspeed

    # A collective: all ranks are here or none.
    with deepspeed.zero.GatheredParameters([weight]):
        # ZeRO-3 frees the gathered table at the end of the context.
        return weight.detach().clone()

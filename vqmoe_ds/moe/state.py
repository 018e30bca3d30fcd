"""State that moves once per optimizer step: kept and read in full precision, and a warning where nobody moves it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

PATIENCE = 1024
"""Micro-batches without an update; no usual accumulation has so many."""
_warned: set[str] = set()


class KeepsPrecision(nn.Module):
    """A module whose own buffers keep their precision where the model around it is cast to a narrower type.

    ``model.bfloat16()`` casts buffers like weights: counts would stop at 256, and running means would not move.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            # Only where it became narrower: float64 is taken if asked for. From the old tensor, as a cast back would
            # not restore the bits that were lost.
            if old is not None and new is not None and new.itemsize < old.itemsize:
                self._buffers[name] = old.to(new.device)
        return self


class SteppedState(KeepsPrecision):
    """Base of modules whose buffers ``StateSync`` moves, from what ``observe`` gathered since the last step."""

    _pending: Tensor | None = None
    micro_batches = 0
    """Observed since the last update."""
    has_observed = False
    """Whether there ever was one."""
    accumulation_steps = 16
    """Micro-batches per optimizer step, of which samples are kept; set by ``StateSync``. Until then some."""

    @property
    def observing(self) -> bool:
        """Whether tokens count now: in training, but not when checkpointing runs a forward again in backward."""
        # A sum that is begun in inference mode could not be added to outside of it.
        return self.training and not recomputing() and not torch.is_inference_mode_enabled()

    @property
    def idle(self) -> bool:
        """Whether it learns from tokens, and has seen none since the last update."""
        return self.has_observed and self._pending is None

    def count_micro_batch(self) -> None:
        """Note one; warns where nobody seems to move the state."""
        self.has_observed = True
        self.micro_batches += 1
        if self.micro_batches == max(PATIENCE, self.accumulation_steps + 1):
            warn_once(
                f"{self.micro_batches} forward passes in training, and routers or codebooks have never learned from "
                "them: make sync = vqmoe_ds.moe.StateSync(model) once, and call sync.step() after every "
                "optimizer.step()"
            )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context without ``torch.autocast``, which casts products whatever type they are given; no more where it is off.

    In bfloat16 about one token in a hundred would go to another code.
    """
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def recomputing() -> bool:
    """True inside backward, where activation checkpointing repeats the forward (both modes)."""
    # Private to PyTorch, but there is no public sign; DeepSpeed's engine and ZeRO-3 go by it too.
    return bool(torch._C._current_graph_task_id() != -1)


def warn_once(text: str) -> None:
    """Warn once per process, however many layers have the same to say."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)

"""Validation loss over held-out windows, shared out over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.data.batches import MASKED, Batch, Windows
from vqmoe_ds.models.session import Session


@dataclass(frozen=True)
class Score:
    """Mean language-model loss in nats per token, and UTF-8 bytes per token where the tokenizer is known."""

    loss: float
    bytes_per_token: float | None

    @property
    def bits_per_byte(self) -> float | None:
        return bits_per_byte(self.loss, self.bytes_per_token)

    def __str__(self) -> str:
        return f"{self.loss:.4f} nats/token" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f} bits/byte"

    def row(self) -> dict[str, float | None]:
        """The figures under the names of metrics and summary."""
        return {"validation_loss": self.loss, "validation_bits_per_byte": self.bits_per_byte}


def bits_per_byte(loss: float | None, bytes_per_token: float | None = 1.0) -> float | None:
    """Nats per token -> bits per byte; None where either is not known."""
    if loss is None or not bytes_per_token:
        return None
    return loss / math.log(2) / bytes_per_token


@torch.no_grad()
def validate(
    session: Session, windows: Windows, most: int | None = None, tell: Callable[[int, int], None] | None = None
) -> Score:
    """Mean loss over all targets that are not masked.

    All ranks run the same number of batches, the last one filled up with windows of weight 0.

    Args:
        most: windows to take, evenly spaced; None: all.
        tell: called with the windows done and to do, after every batch.

    Raises:
        Interrupted: a rank was asked to stop.
    """
    size, readers, round_size = session.config.micro_batch, session.config.readers, session.round_size
    count = len(windows) if most is None else min(len(windows), most)
    positions = np.linspace(0, len(windows) - 1, count).astype(int)
    rounds = -(-count // round_size)
    padded = np.resize(positions, rounds * round_size)
    weight = (np.arange(rounds * round_size) < count).reshape(rounds, readers, size)[:, session.reader]
    mine = padded.reshape(rounds, readers, size)[:, session.reader]
    session.engine.eval()
    total, known = torch.zeros(3, dtype=torch.float64, device=session.device), True
    try:
        for number, (rows, row_weight) in enumerate(zip(mine, weight, strict=True)):
            # Here and in the forward pass ranks meet, so that each makes every round, whatever its windows weigh.
            session.go_on()
            if tell is not None:
                tell(number * round_size, count)
            batch = windows.read(rows)
            known = known and batch.bytes_B is not None
            weights_B = torch.from_numpy(row_weight.astype(np.float64)).to(session.device)
            total += (_row_totals(session, batch) * weights_B).sum(dim=1)
    finally:
        session.engine.train()
    # Divided only after the sum over ranks, which masked targets leave with different numbers of them.
    nats, targets, target_bytes = (float(v) for v in session.sum_over_ranks(total))
    targets = max(targets, 1e-9)
    return Score(nats / targets, target_bytes / targets if known else None)


def _row_totals(session: Session, batch: Batch) -> Tensor:
    """Nats, targets and bytes of each window, over its positions; float64 ``[3, B]``."""
    inputs_BS, targets_BS = (torch.from_numpy(ids).to(session.device) for ids in (batch.inputs_BS, batch.targets_BS))
    logits_BSV, _ = session.engine(inputs_BS.contiguous(), **session.documents_of(batch))
    if session.model.share is not None:  # the mean over its group is that of whole windows
        targets_BS = targets_BS[:, session.model.share.span]
    # float32: a loss in bf16 would have two or three digits.
    losses_BS = torch.nn.functional.cross_entropy(
        logits_BSV.float().transpose(1, 2), targets_BS, ignore_index=MASKED, reduction="none"
    )
    rows = len(targets_BS)
    # All three by position: ranks that share a window then count it equally often in each, and their ratios stand.
    bytes_B = np.zeros(rows) if batch.bytes_B is None else batch.bytes_B / batch.targets_BS.shape[1]
    means = [losses_BS.double().mean(dim=1), targets_BS.ne(MASKED).double().mean(dim=1)]
    return torch.stack([*means, torch.from_numpy(bytes_B).to(session.device)])

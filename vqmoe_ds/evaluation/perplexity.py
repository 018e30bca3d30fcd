"""Validation loss over held-out windows, shared out over all ranks."""

from __future__ import annotations

import math

import numpy as np
import torch

from vqmoe_ds.data.corpus import Split
from vqmoe_ds.train.engine import Session


def bits_per_byte(loss: float, bytes_per_token: float = 1.0) -> float:
    """Nats a token -> bits a byte."""
    return loss / math.log(2) / bytes_per_token


@torch.no_grad()
def validation_loss(session: Session, split: Split, max_batches: int | None = None) -> float:
    """Mean language-model loss in nats a token.

    Windows are weighted equally, and evenly spaced ones are taken if ``max_batches`` (of the micro-batch size on every
    rank) cannot hold all. All ranks run the same number of batches, the last one filled up with windows of weight 0.
    """
    place, size = session.place, session.config.micro_batch
    round_size = size * place.world_size
    count = len(split) if max_batches is None else min(len(split), max_batches * round_size)
    positions = np.linspace(0, len(split) - 1, count).astype(int)
    rounds = -(-count // round_size)
    padded = np.resize(positions, rounds * round_size)
    weight = (np.arange(rounds * round_size) < count).reshape(rounds, place.world_size, size)[:, place.rank]
    mine = padded.reshape(rounds, place.world_size, size)[:, place.rank]
    session.engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=session.device)
    for rows, row_weight in zip(mine, weight, strict=True):
        tokens = torch.from_numpy(split.batch(rows)).to(session.device)
        logits_BSV, _ = session.engine(tokens[:, :-1].contiguous())
        losses_BS = torch.nn.functional.cross_entropy(
            logits_BSV.float().transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        weights_B = torch.from_numpy(row_weight.astype(np.float64)).to(session.device)
        total += torch.stack([(losses_BS.double().mean(dim=1) * weights_B).sum(), weights_B.sum()])
    session.engine.train()
    total = session.sum_over_ranks(total)
    return float(total[0] / total[1])

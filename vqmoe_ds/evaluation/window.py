"""Scores of every token of a text, each exactly once, through windows that slide over it.

Windows are as long as the model's context. The first starts with the document and scores all its targets; each later
one ends ``stride`` tokens further and scores these alone, so that every one of them has at least ``context - stride``
tokens before it. No window reaches from one document into another, and the first token of a document is not scored:
nothing stands before it.

Where ranks share sequences (``models/ulysses.py``) each rank of a group scores the positions that it holds.

Legend: N tokens of all documents, K targets per position, B windows per batch, S positions, M scored, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vqmoe_ds.data.batches import MASKED
from vqmoe_ds.moe.sequence import SequenceShare

LOGITS = 1 << 25
"""Logits of a batch, at most (128 MiB)."""


class Scored(NamedTuple):
    """Nats of every target ``[K, N]`` (float64; 0 where nothing is scored), and whether no id was likelier."""

    nats_KN: np.ndarray
    first_choice_KN: np.ndarray


class Window(NamedTuple):
    """Inputs ``begin`` to ``end - 1`` predict targets ``begin + 1`` to ``end``; those from ``first`` on are scored."""

    begin: int
    first: int
    end: int


def windows_of(lengths: Sequence[int], context: int, stride: int) -> list[Window]:
    """Windows over documents that stand end to end.

    Args:
        lengths: tokens of each document.
        context: S, inputs of a window at most.
        stride: targets that each window but the first scores, 1 to ``context``.
    """
    windows, start = [], 0
    for length in lengths:
        last = start + length - 1
        end = min(start + context, last)
        if end > start:
            windows.append(Window(start, start + 1, end))
        while end < last:
            first, end = end + 1, min(end + stride, last)
            windows.append(Window(end - context, first, end))
        start += length
    return windows


@torch.no_grad()
def score(
    model: torch.nn.Module,
    ids_N: np.ndarray,
    targets_KN: np.ndarray,
    windows: Sequence[Window],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    tell: Callable[[int], Any] | None = None,
) -> Scored:
    """Score every target in its window. The answer is the same on all ranks.

    Args:
        model: gives logits for ``[B, S]``; in evaluation mode. With experts on other ranks all ranks take part. If it
            has a ``share``, ranks of a group get the same windows, and logits of their own positions.
        ids_N: inputs, documents end to end.
        targets_KN: what is asked for at each place, ``MASKED`` for nothing; ``ids_N`` itself for the usual loss.
        windows: of ``windows_of``.
        batch_size: windows per forward pass.
        rank, world: this process among those that share the windows.
        tell: called with the windows done (of all ranks) after each pass.
    """
    device, share = next(model.parameters()).device, getattr(model, "share", None)
    reader, readers = (rank, world) if share is None else (rank // share.size, world // share.size)
    nats_KN = torch.zeros(targets_KN.shape, dtype=torch.float64, device=device)
    first_KN = torch.zeros(targets_KN.shape, dtype=torch.uint8, device=device)
    # Windows of one length stand together, so that little is filled up; every rank makes the same batches.
    order = sorted(windows, key=lambda window: window.begin - window.end)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for start in range(0, len(batches), readers):
        mine = start + reader
        batch = batches[min(mine, len(batches) - 1)]  # all take part in every pass
        places_M, nats_KM, first_KM = _score_batch(model, ids_N, targets_KN, batch, device, share)
        if mine < len(batches):
            nats_KN[:, places_M], first_KN[:, places_M] = nats_KM, first_KM
        if tell is not None:
            tell(sum(map(len, batches[start : start + readers])))
    if world > 1:
        # A target is scored on one rank and 0 on the others, so the sum gathers.
        dist.all_reduce(nats_KN)
        dist.all_reduce(first_KN)
    return Scored(nats_KN.cpu().numpy(), first_KN.cpu().numpy().astype(bool))


def _score_batch(
    model: torch.nn.Module,
    ids_N: np.ndarray,
    targets_KN: np.ndarray,
    batch: Sequence[Window],
    device: torch.device,
    share: SequenceShare | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the targets of a batch that are scored here, ``[M]``; nats, and whether first choice, ``[K, M]``."""
    # Models whose ranks share sequences take those of one length alone.
    longest = max(window.end - window.begin for window in batch) if share is None else share.length
    # What fills a row up stands behind all that is scored in it, where a causal model does not look.
    inputs_BS = np.zeros((len(batch), longest), dtype=np.int64)
    rows, columns, places = [], [], []
    for row, (begin, first, end) in enumerate(batch):
        inputs_BS[row, : end - begin] = ids_N[begin:end]
        rows.append(np.full(end + 1 - first, row))
        columns.append(np.arange(first - 1 - begin, end - begin))
        places.append(np.arange(first, end + 1))
    logits_BSV, _ = model(torch.from_numpy(inputs_BS).to(device))
    rows_M, columns_M, places_M = (np.concatenate(part) for part in (rows, columns, places))
    if share is not None:
        first, end = share.span.start, share.span.stop
        here_M = (first <= columns_M) & (columns_M < end)
        rows_M, columns_M, places_M = rows_M[here_M], columns_M[here_M] - first, places_M[here_M]
    # Widened are those alone that are scored; in bf16 nats would have two or three digits.
    logits_MV = logits_BSV[torch.from_numpy(rows_M).to(device), torch.from_numpy(columns_M).to(device)].float()
    targets_KM = torch.from_numpy(targets_KN[:, places_M].astype(np.int64)).to(device)
    # ``MASKED`` is negative and no index; what is gathered for it is zeroed below.
    chosen_KM = logits_MV.gather(1, targets_KM.clamp_min(0).t()).t()
    nats_KM = (logits_MV.logsumexp(dim=-1) - chosen_KM).double().masked_fill_(targets_KM == MASKED, 0.0)
    return torch.from_numpy(places_M).to(device), nats_KM, (chosen_KM == logits_MV.amax(dim=-1)).byte()


def fitting_batch(context: int, vocab_size: int) -> int:
    """Windows per pass whose logits stay within ``LOGITS``, at most 32."""
    return max(1, min(32, LOGITS // (context * vocab_size)))

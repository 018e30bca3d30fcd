"""A model on its DeepSpeed engine: what a training loop holds, and what measures and saves it read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.data.batches import Batch
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.state_sync import StateSync
from vqmoe_ds.runtime.ranks import Place
from vqmoe_ds.runtime.stopping import STOP, Interrupted


@dataclass
class Session:
    """Everything a training loop holds on to."""

    config: EngineConfig
    place: Place
    engine: Any
    model: MoETransformer
    sync: StateSync
    """Moves what is learned from statistics of all ranks: codebooks, or routers with state."""

    fingerprint: dict[str, str] = field(default_factory=dict)
    """Checksums of what the run reads (``data/fingerprint.py``), for its checkpoints."""
    begun_from: str | None = None
    """The checkpoint that ``--resume`` named when the run began, for its checkpoints."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    @property
    def reader(self) -> int:
        """Number of this rank among those that read different sequences; ranks that share them have the same."""
        return self.place.rank // self.config.sp_size

    @property
    def round_size(self) -> int:
        """Sequences in one micro-batch of every reader."""
        return self.config.micro_batch * self.config.readers

    def documents_of(self, batch: Batch) -> dict[str, Tensor]:
        """What tells the model of documents that are kept apart, by argument; nothing where a window is one text."""
        if batch.positions_BS is None:
            return {}
        return {"positions_BS": self.tensor(batch.positions_BS)}

    def tensor(self, values: np.ndarray) -> Tensor:
        """Values as a tensor on the device, without waiting for the copy."""
        # Pinned, since from pageable memory the copy would block the host however it is asked.
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def mean_over_ranks(self, tensor: Tensor) -> Tensor:
        """Average over all ranks, on the device; NaN on one rank is NaN on all."""
        return self.sum_over_ranks(tensor) / self.place.world_size

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        if self.place.world_size > 1:
            deepspeed.comm.all_reduce(total)
        return total

    def sum_over_readers(self, tensor: Tensor) -> Tensor:
        """Sum over ranks where those that share sequences found the same, and it counts once."""
        # The others send zeros and do not stay away, for the sum is over all ranks.
        speaks = self.place.rank % self.config.sp_size == 0
        return self.sum_over_ranks(tensor if speaks else torch.zeros_like(tensor))

    def on_any_rank(self, here: bool) -> bool:
        """Whether it is so on this rank or another; all ranks call it together."""
        if self.place.world_size == 1:
            return here
        return float(self.sum_over_ranks(torch.tensor([float(here)], device=self.device))) > 0

    def go_on(self) -> None:
        """All ranks call it between the parts of a measurement that may take long.

        Raises:
            Interrupted: a rank was asked to stop.
        """
        # A signal reaches ranks at different moments: one that left by itself would leave the others in the next
        # collective.
        if self.on_any_rank(STOP.reason is not None):
            raise Interrupted

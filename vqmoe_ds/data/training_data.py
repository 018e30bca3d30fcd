"""Training text, raw or prepared, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import Batches, Windows


class TrainingData(Protocol):
    """Text that was found good, before any of it is read."""

    @property
    def vocab_size(self) -> int | None:
        """Ids of the tokenizer; None where it is unknown."""

    @property
    def tokenizer_sha256(self) -> str | None:
        """Checksum of the tokenizer, "unknown", or None for raw text."""

    def summary(self) -> str:
        """Name and size, for the user."""

    def open(self, config: RunConfig, cache: Path) -> tuple[Batches, Windows]:
        """Training batches and held-out windows; all ranks call it together, after the process group is up."""

    def encode(self, text: str) -> list[int] | None:
        """Ids of a text; None where the tokenizer is unknown."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""

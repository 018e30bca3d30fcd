"""A pretrained checkpoint as what a fine-tuning starts from: renamed, completed, and without an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.reader import CheckpointReader, Piece, WeightsReader
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.build import fresh, pretrained_name


class StartingWeights(WeightsReader):
    """A view of a checkpoint with the parameters of a model to be fine-tuned; nothing is read before it is asked for.

    Args:
        source: the pretrained model, of a vq one perhaps a ``DiscreteOnly``.
        run: the configuration of the fine-tuning.
        shapes: of its model's parameters (``whole_shapes``).
    """

    def __init__(self, source: CheckpointReader, run: RunConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.source, self.run, self.path, self.kind, self.step = source, run, source.path, source.kind, 0
        self.config = run.model_dump(mode="json")
        made = {name: fresh(name, shape, run) for name, shape in shapes.items()}
        self._fresh = {name: values for name, values in made.items() if values is not None}
        self._names = {name: pretrained_name(name) for name in shapes}
        taken = set(self._names.values())
        self._shapes = {
            # What the model has no use for stays listed, so that check_same_model refuses the checkpoint by its name.
            **{name: shape for name, shape in source.shapes.items() if name not in taken},
            **{name: source.shapes[old] for name, old in self._names.items() if old in source.shapes},
            **{name: tuple(values.shape) for name, values in self._fresh.items()},
        }

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the source; where codes look at a copy of the embeddings that never moves, it is made here."""
        buffers = self.source.buffers()
        ready = bool(buffers.get("source.table_ready", torch.tensor(False))) and "source.table_VD" in buffers
        if self.run.codebook.source_momentum == 1 and not ready:
            table = {"source.table_VD": self.source.tensor("embed.weight"), "source.table_ready": torch.tensor(True)}
            return {**buffers, **table}
        return buffers

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        return self.source.pieces(self._names[name], kind)

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        if name in self._fresh:
            return self._fresh[name].flatten()[start : start + count]
        return self.source.read(self._names[name], kind, start, count)

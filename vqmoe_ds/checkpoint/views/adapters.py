"""A checkpoint with LoRA adapters as the model that they make."""

from __future__ import annotations

import copy
import math

from torch import Tensor

from vqmoe_ds.checkpoint.reader import CheckpointReader, Piece, WeightsReader, sound


def merged(reader: CheckpointReader) -> CheckpointReader:
    """``MergedAdapters`` of a checkpoint that has adapters, any other as it is."""
    if not reader.config.get("finetune", {}).get("lora_rank"):
        return reader
    with sound(reader.path):
        return MergedAdapters(reader)


class MergedAdapters(WeightsReader):
    """A view without adapters and optimizer: ``W + alpha / r B A`` wherever there was ``W`` with A and B.

    Args:
        source: of a fine-tuning with ``finetune.lora_rank``.
    """

    def __init__(self, source: CheckpointReader) -> None:
        from vqmoe_ds.models.build import pretrained_name  # imports DeepSpeed, which takes seconds

        super().__init__()
        self.source, self.path, self.kind, self.step, self.layout = source, source.path, source.kind, source.step, {}
        self.config = copy.deepcopy(source.config)
        self.scale = self.config["finetune"]["lora_alpha"] / self.config["finetune"]["lora_rank"]
        self.config["finetune"]["lora_rank"] = 0
        self._names = {pretrained_name(name): name for name in source.names() if ".lora_" not in name}
        self._shapes = {name: source.shape(old) for name, old in self._names.items()}

    def buffers(self) -> dict[str, Tensor]:
        return self.source.buffers()

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        """Pieces of the source; of an adapted matrix those without its adapter, ``read`` has the values."""
        return self.source.pieces(self._names[name], kind)

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        old = self._names[name]
        if old == name:
            return self.source.read(name, kind, start, count)
        # The names that peft's inject_adapter_in_model gives to a wrapped layer and to its adapter.
        prefix = old.removesuffix("base_layer.weight")
        down_RD, up_DR = (self.source.tensor(f"{prefix}lora_{part}.default.weight") for part in "AB")
        # Rows of the product that hold these values, so that no whole matrix is made for a few of them.
        width = math.prod(self.shape(name)[1:])
        first, last = start // width, -(-(start + count) // width)
        rows = (up_DR[first:last] @ down_RD * self.scale).flatten()[start - first * width :][:count]
        return self.source.read(old, kind, start, count) + rows

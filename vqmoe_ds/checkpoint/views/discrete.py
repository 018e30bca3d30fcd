"""A checkpoint with its discrete path alone: no continuous router, no path gate, the codebook frozen."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from vqmoe_ds.checkpoint.reader import CheckpointReader, Piece, WeightsReader
from vqmoe_ds.config.routers import options_for
from vqmoe_ds.config.schema import MoEConfig
from vqmoe_ds.runtime.errors import CheckpointError

DROPPED = (".router.continuous.", ".router.path_gate.")


class DiscreteOnly(WeightsReader):
    """A view of a VQMoE checkpoint for discrete inference and fine-tuning, without an optimizer.

    Args:
        source: the whole checkpoint.

    Raises:
        CheckpointError: its router has no discrete path.
    """

    def __init__(self, source: CheckpointReader) -> None:
        moe = MoEConfig(**source.config["moe"])
        if not moe.facts.has_discrete_path:
            raise CheckpointError(
                f"{source.path} has moe.router={moe.router}, which has no discrete path; only moe.router=vq can be "
                "converted with --to discrete-only"
            )
        self.source, self.path, self.kind, self.step = source, source.path, source.kind, source.step
        self.layout, self.counters, self.client_state = source.layout, source.counters, source.client_state
        self.frozen = source.frozen
        self.config = discrete_config(source.config)
        self._shapes = {n: s for n, s in source.shapes.items() if not any(part in n for part in DROPPED)}

    def buffers(self) -> dict[str, Tensor]:
        # A frozen codebook has no Adam, and a model of it no buffers for one.
        return {n: buffer for n, buffer in self.source.buffers().items() if not n.startswith("bank.adam_")}

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        if kind != "fp32":
            raise CheckpointError(f"{self.path}: a discrete-only checkpoint has no {kind}")
        return self.source.pieces(name)

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """Read through the source, which puts the values of Megatron's and of adapted weights together."""
        self.pieces(name, kind)
        return self.source.read(name, kind, start, count)


def _calls(config: dict[str, Any]) -> int:
    moe = MoEConfig(**config["moe"])
    return moe.facts.rows_per_token(moe, options_for(moe.router, config.get("router", {})))


def discrete_config(config: dict[str, Any]) -> dict[str, Any]:
    """The run configuration of the discrete path: ``moe.top_k=0``, ``codebook.learning=frozen``."""
    config = copy.deepcopy(config)
    model, moe = config["model"], config["moe"]
    # The width of dense blocks follows the number of expert calls, which falls now, unless it is written out.
    if model["moe_every"] > 1 or model.get("dense_layers"):
        calls = _calls(config) + moe.get("shared_experts", 0)
        model["dense_hidden"] = model["dense_hidden"] or moe["expert_hidden"] * calls
    moe["top_k"] = 0
    config["codebook"].update(learning="frozen", commitment_weight=0.0)
    return config

"""The parameters of a model, read off the real model class on the meta device: nothing is counted a second way.

Legend: N experts, E local experts of a rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vqmoe_ds.checkpoint.figures import sizes
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.build import pretrained_class
from vqmoe_ds.models.parameter_groups import decays
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.layer import MoELayer


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole model; experts are stacked, ``shape[0] = N``."""

    name: str
    shape: tuple[int, ...]
    decays: bool
    """Whether it is in the group of what decays."""

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.name

    @property
    def group(self) -> str:
        """The optimizer group that DeepSpeed partitions it in."""
        return "experts" if self.is_expert else "matrices" if self.decays else "vectors"

    def numel(self, ep_size: int = 1) -> int:
        """Values of it that one rank uses: its own experts, all of anything else."""
        return math.prod(self.shape) // (ep_size if self.is_expert else 1)


@dataclass(frozen=True)
class Parameters:
    """Every weight of a model and the bytes of its buffers."""

    weights: tuple[Weight, ...]
    buffer_bytes: int
    """Codebooks, tables and rotary angles, the same on every rank whatever the layout."""
    stored: int
    active: int
    """Values used per token."""
    forward_flops_per_token: int

    def of_rank(self, ep_size: int) -> int:
        """Values that a rank uses."""
        return sum(weight.numel(ep_size) for weight in self.weights)

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(w.group for w in self.weights))


def meta_model(
    run: RunConfig, ep_size: int = 1, ep_rank: int = 0, layer_class: type[MoELayer] = MoELayer
) -> MoETransformer:
    """The real model class without memory: shapes and types, no values."""
    with torch.device("meta"):
        return pretrained_class(run)(run, ep_size, ep_rank, layer_class)


_thin: dict[str, MoETransformer] = {}


def thin_model(run: RunConfig) -> MoETransformer:
    """A meta model with one expert per layer, since drawing all of them takes long; made once per configuration."""
    key = run.model_dump_json()
    if key not in _thin:
        _thin[key] = meta_model(run, run.moe.num_experts if run.moe.facts.has_experts else 1)
        for layer in _thin[key].moe_layers():
            layer.ep_size = 1  # there is nobody to exchange rows with
    return _thin[key]


def least_bytes(run: RunConfig, ep_size: int = 1) -> int:
    """Bytes of float32 weights that a rank uses, and of the buffers, at least; from two shallow models of its blocks.

    After the first dense ones, and those whose router is a plain one, blocks repeat every ``moe_every``: sizes grow
    evenly with them. A deep model takes minutes to be made, and this is asked before it is known that there is room.
    """
    period = run.model.moe_every
    plain: int = getattr(run.router, "plain_layers", 1)
    few = (1 + plain + -(-run.model.dense_layers // period)) * period
    more = few + period
    if run.model.layers <= more:
        return _bytes(run, ep_size)
    # The shallow models may lack that block, and no size depends on which one it is. They are not validated: a router
    # may refuse so few layers, which the user did not ask for.
    book = run.codebook.model_copy(update={"source_block": 0})
    shallow = [
        run.model_copy(update={"model": run.model.model_copy(update={"layers": layers}), "codebook": book})
        for layers in (few, more)
    ]
    small, larger = (_bytes(config, ep_size) for config in shallow)
    return small + (larger - small) * ((run.model.layers - few) // period)


def _bytes(run: RunConfig, ep_size: int) -> int:
    parameters = count(run)
    return 4 * parameters.of_rank(ep_size) + parameters.buffer_bytes


def count(run: RunConfig) -> Parameters:
    """All parameters of the model of ``run``."""
    model, experts = thin_model(run), run.moe.num_experts
    shapes = {
        name: (experts, *param.shape[1:]) if ".experts." in name else tuple(param.shape)
        for name, param in model.named_parameters()
    }
    return Parameters(
        tuple(Weight(name, shape, decays(name, len(shape), run.train.decay_gates)) for name, shape in shapes.items()),
        sum(buffer.nbytes for buffer in model.buffers()),
        **sizes(shapes, run),
    )

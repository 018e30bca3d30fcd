"""The experts of a checkpoint of any kind, read one by one from its files while a model runs.

Nothing is converted: an expert is some stretches of values in some files, whatever layout wrote them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.io.archive import Stored
from vqmoe_ds.checkpoint.io.direct import read_past_cache
from vqmoe_ds.checkpoint.reader import CHUNK, CheckpointReader
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.expert_store import PARTS, ExpertStore, Source, bind_store
from vqmoe_ds.runtime.device import ACCELERATOR
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.memory import free_bytes

_SERIAL = 1 << 14
"""Values that PyTorch converts on the calling thread: reading threads must not start computing threads of their own."""


def check_place(config: RunConfig, device: torch.device, ep_size: int) -> None:
    """Refuse a memory for experts where there is no use for one.

    Raises:
        ConfigError: a GPU, experts on several ranks, or a model without any.
    """
    if device.type != "cpu":
        raise ConfigError(f"--expert_memory is for experts on a CPU; leave it out on a GPU, or set {ACCELERATOR}=cpu")
    if ep_size > 1:
        raise ConfigError(f"--expert_memory holds all experts on one rank; leave out one of it and --ep_size {ep_size}")
    if not config.moe.facts.has_experts:
        raise ConfigError(f"--expert_memory: the model has no experts (moe.router={config.moe.router}); leave it out")


def open_store(reader: CheckpointReader, config: RunConfig, dtype: torch.dtype, budget: int) -> ExpertStore:
    """A store of the experts of a language model.

    Args:
        reader: of the checkpoint, which was checked to be of this model.
        config: of the run.
        dtype: of the weights in memory.
        budget: bytes of experts in memory, at most.

    Raises:
        CheckpointError: files are missing.
        ConfigError: the budget is smaller than one expert.
    """
    model, moe = config.model, config.moe
    blocks = model.moe_blocks
    names = {
        (layer, part): f"blocks.{block}.mlp.experts.{part}" for layer, block in enumerate(blocks) for part in PARTS
    }
    in_files = sum(p.length * p.stored.dtype.itemsize for name in names.values() for p in reader.pieces(name))
    # Where all experts fit into what is left beside the budget, the system may as well cache them.
    cached = in_files + budget <= free_bytes()

    def fetch(layer: int, expert: int, part: str, out: Tensor) -> None:
        # Experts are stacked along the first dimension: the values of one follow each other.
        _fill(out.view(-1), reader, names[layer, part], expert * out.numel(), cached)

    source = Source(str(reader.path), len(blocks), moe.num_experts, model.width, moe.expert_hidden, dtype, fetch)
    return ExpertStore(source, budget)


def bind(model: MoETransformer, store: ExpertStore) -> None:
    """Let a model of ``StoredMoELayer`` take its experts from a store, and tell it of those that are known ahead."""
    bind_store(model.moe_layers(), store)
    model.expert_store = store


@torch.no_grad()
def _fill(out: Tensor, reader: CheckpointReader, name: str, first: int, cached: bool) -> None:
    """Fill a flat tensor with a parameter's values from ``first`` on, straight from the file where types agree."""
    pieces = reader.pieces(name)
    # In memory order alone: with strides only the whole tensor can be read.
    for start, length, stored, begin in pieces:
        if start <= first and first + len(out) <= start + length and stored.stride is None:
            begin += first - start
            if stored.dtype == out.dtype:
                return _read(stored, begin, out, cached)
            values = torch.empty(min(CHUNK, len(out)), dtype=stored.dtype)
            for part in out.split(CHUNK):
                _read(stored, begin, values[: len(part)], cached)
                _convert(part, values[: len(part)])
                begin += len(part)
            return None
    # A reader without pieces puts whole experts together at every call.
    for part in out.split(CHUNK if pieces else len(out)):
        _convert(part, reader.read(name, "fp32", first, len(part)))
        first += len(part)


def _read(stored: Stored, start: int, out: Tensor, cached: bool) -> None:
    """``stored.read_into``, past the system's page cache where that could not hold all experts."""
    if cached or not read_past_cache(stored.path, stored.offset + start * stored.dtype.itemsize, out):
        stored.read_into(start, out)


def _convert(out: Tensor, values: Tensor) -> None:
    for here, there in zip(out.split(_SERIAL), values.split(_SERIAL), strict=True):
        here.copy_(there)

"""The check that the ranks of a machine fit its memory, made before a model is built."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.runtime.device import uses_gpu
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.memory import GIB, parse_memory, total_bytes

if TYPE_CHECKING:
    from vqmoe_ds.runtime.ranks import Place


def check_host_memory(config: EngineConfig, place: Place) -> None:
    """Refuse a model that the CPU ranks of this machine cannot hold; on GPUs ``fit.too_large`` is asked.

    Counted are this rank's weights and buffers in float32 and, of a pretraining, the optimizer and the larger of
    gradients and what one forward pass keeps, as ``fit`` counts them; all as often as there are ranks here.

    Raises:
        ConfigError: what it needs, what there is, and the largest part of it.
    """
    if uses_gpu():
        return
    there, ranks = total_bytes(), place.local_world_size
    if ranks * _at_most(config) < there:
        return
    # Weights first: only of a model that could be held is it quick to count all the rest.
    from vqmoe_ds.planning import fit, parameters

    need = ranks * (parameters.least_bytes(config.run, config.ep_size) - _in_file(config.run))
    if need <= there and config.run.finetune.checkpoint is None:
        need = ranks * fit.least_bytes(config, place.rank)
    if need > there:
        who = "this rank needs" if ranks == 1 else f"the {ranks} ranks of this machine need"
        raise ConfigError(
            f"{who} at least {need / GIB:,.1f} GiB for a model of model.layers={config.run.model.layers}, "
            f"model.width={config.run.model.width}, moe.num_experts={config.run.moe.num_experts} and "
            f"model.vocab_size={config.run.model.vocab_size}, and this machine has {there / GIB:,.1f} GiB; reduce one "
            "of these, model.sequence_length or the micro-batch, or take more machines"
        )


def expert_memory(run: RunConfig) -> int | None:
    """Bytes of memory for the frozen experts of a fine-tuning, which lie in a file; None: they are all in memory."""
    return parse_memory(run.finetune.expert_memory, "--expert_memory") if run.finetune.checkpoint else None


def _in_file(run: RunConfig) -> int:
    """Bytes of experts in float32 that are not in memory."""
    memory = expert_memory(run)
    # Three matrices of four bytes a value.
    experts = 12 * len(run.model.moe_blocks) * run.moe.num_experts * run.moe.expert_hidden * run.model.width
    return 0 if memory is None else max(0, experts - memory)


def _at_most(config: EngineConfig) -> int:
    """Upper bound of a rank's bytes, by which small models pass without the imports that counting takes (1.3 s)."""
    run, model, moe, book = config.run, config.run.model, config.run.moe, config.run.codebook
    low_dim: int | None = getattr(run.router, "low_dim", None)
    routed = 0 if low_dim is None else low_dim or moe.num_experts + 50  # 0: half the experts, or 50
    wide = max(model.width, run.source_width, model.attention_width, moe.expert_hidden, routed)
    dense = max(run.dense_hidden, moe.shared_experts * moe.expert_hidden)
    tables = 4 * (book.num_codes or moe.num_experts) + 4 * moe.num_experts + 2 * model.sequence_length
    values = model.layers * wide * (8 * wide + 4 * moe.num_experts * wide + 4 * dense + tables)
    values += model.vocab_size * (3 * wide + model.layers * routed)
    values += math.prod(moe.facts.table_shape(run, model.layers))
    tokens = config.micro_batch * model.sequence_length
    calls = max(1 + moe.top_k, run.rows_per_token)
    # Scores of experts, of slots, and of tokens by one another in the mask of separate documents.
    scores = moe.num_experts + calls * model.sequence_length
    kept = tokens * (model.layers * (64 * (wide * calls + dense) + 8 * scores) + 4 * model.vocab_size)
    return 4 * (10 * values + kept)

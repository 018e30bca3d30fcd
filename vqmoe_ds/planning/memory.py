"""Memory of one rank, by part, under DeepSpeed 0.19.8's ZeRO stages.

Weights, gradients and optimizer state follow DeepSpeed's own groups, partitions and paddings, and are compared with the
tensors of real engines in tests/planning. Activations are what autograd keeps in a forward pass of the real model on
meta tensors. The rest (buckets, gathered weights) is what DeepSpeed may allocate at most.

Legend: L MoE layers, K codes, C code width, N experts.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch

from vqmoe_ds.checkpoint.formats.deepspeed.reader import ep_place
from vqmoe_ds.checkpoint.formats.deepspeed.zero import ALIGNMENT, Member, cut_experts
from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.schema import CodeSource, RunConfig
from vqmoe_ds.planning import meta_forward
from vqmoe_ds.planning.parameters import Parameters, thin_model


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device, by part, and in the host's memory."""

    weights: int
    gradients: int
    """Held when the optimizer steps."""
    optimizer: int
    """Moments, and the float32 copy of low-precision or partitioned weights."""
    buckets: int
    """Peak of what reductions, gathers and gradients in flight need at once."""
    activations: int
    dispatch: int
    """Sorted and received rows of one layer, in and out."""
    codebook: int
    host: int = 0
    """Offloaded parts, per rank."""

    @property
    def device(self) -> int:
        return sum(value for name, value in asdict(self).items() if name != "host")


@dataclass(frozen=True)
class Group:
    """An optimizer group as DeepSpeed builds it: weights laid end to end, split evenly over ``ranks`` ranks."""

    weights: tuple[Member, ...]
    sizes: tuple[int, ...]
    ranks: int
    is_expert: bool

    @property
    def padded(self) -> int:
        """Values with the alignment of ZeRO-1 and 2."""
        step = ALIGNMENT * self.ranks
        return -(-sum(self.sizes) // step) * step

    def touched(self, rank: int) -> int:
        """Values of the weights of which any part lies in the partition of ``rank`` (its number in the group)."""
        part = self.padded // self.ranks
        first, end, total = part * rank, part * (rank + 1), 0
        start = 0
        for size in self.sizes:
            total += size if start < end and start + size > first else 0
            start += size
        return total


def optimizer_groups(parameters: Parameters, config: EngineConfig) -> list[Group]:
    """Matrices, vectors and groups of experts; the engine's, in its order."""
    groups = []
    for name in ("matrices", "vectors", "experts"):
        weights = [w for w in parameters.weights if w.group == name]
        members = [Member(w.name, w.name, 0, (w.numel(config.ep_size),)) for w in weights]
        is_expert = name == "experts"
        ranks = config.world_size // config.ep_size if is_expert else config.world_size
        for part in cut_experts(members) if is_expert else filter(None, [members]):
            groups.append(Group(tuple(part), tuple(m.numel for m in part), ranks, is_expert))
    return groups


def place_in_group(config: EngineConfig, rank: int, group: Group) -> int:
    """Number of ``rank`` in the data-parallel or expert-data-parallel group that shares ``group``."""
    if not group.is_expert:
        return rank
    data_first = bool(config.deepspeed.get("use_data_before_expert_parallelism"))
    return ep_place(rank, config.world_size, config.ep_size, data_first)[1]


def estimate(parameters: Parameters, config: EngineConfig, rank: int = 0, imbalance: float = 1.0) -> Memory:
    """Bytes that ``rank`` holds at the peak of a step.

    Args:
        parameters: of the model of ``config.run``.
        config: layout, precision, batch sizes and the DeepSpeed JSON.
        rank: global rank.
        imbalance: rows its experts receive, relative to the mean.
    """
    weights, gradients, optimizer, host = states(parameters, config, rank)
    held, rows = activations(config, imbalance), dispatch_rows(config, imbalance)
    buckets = _buckets(parameters, config, gradients, held + rows)
    return Memory(weights, gradients, optimizer, buckets, held, rows, codebook(config, parameters), host)


def width_of(config: EngineConfig) -> int:
    """Bytes of a weight in forward and backward."""
    return 4 if config.precision == "fp32" else 2


def accumulates_in_fp32(config: EngineConfig) -> bool:
    """Whether ``data_types.grad_accum_dtype`` asks for float32 sums of low-precision gradients."""
    wanted = config.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    return config.precision != "fp32" and wanted in ("fp32", "float32")


def offloads(config: EngineConfig, what: str = "optimizer") -> bool:
    """Whether the optimizer (or, ``what="param"``, the weights) live in the host's memory."""
    section = config.deepspeed.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return section.get("device", "none") != "none"


def states(parameters: Parameters, config: EngineConfig, rank: int) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients and optimizer state on the device, and of what lies in the host's memory."""
    groups, low = optimizer_groups(parameters, config), width_of(config)
    if config.zero_stage == 0:
        values = sum(sum(g.sizes) for g in groups)
        # Adam's two moments, and in 16 bits the float32 weights.
        return low * values, low * values, (8 if low == 4 else 12) * values, 0
    if config.zero_stage == 3:
        return _states_of_zero3(groups, config)
    parts = sum(g.padded // g.ranks for g in groups)
    whole = sum(g.padded for g in groups)
    gradients = low * sum(g.touched(place_in_group(config, rank, g)) for g in groups)
    if accumulates_in_fp32(config):  # stage 1 becomes DeepSpeed's BF16_Optimizer, which partitions moments alone
        gradients = 4 * parts if config.zero_stage == 2 else 4 * whole + low * sum(sum(g.sizes) for g in groups)
    if offloads(config):  # float32 copy, moments and gradients; new weights on their way back; sums of micro-batches
        return low * whole, 0, 0, (12 + 4 + low + (low if config.accumulation_steps > 1 else 0)) * parts
    return low * whole, gradients, 12 * parts, 0


def _states_of_zero3(groups: list[Group], config: EngineConfig) -> tuple[int, int, int, int]:
    low = width_of(config)
    zero = config.deepspeed.get("zero_optimization", {})
    threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
    # ZeRO-3 cuts every parameter by itself, ZeRO-1 and 2 whole groups.
    parts = sum(-(-size // g.ranks) for g in groups for size in g.sizes)
    # What is small stays whole beside its part; a part that is the whole is not copied.
    kept = sum(size for g in groups for size in g.sizes if size <= threshold and g.ranks > 1)
    gradients = (4 if accumulates_in_fp32(config) else low) * parts
    host, optimizer, weights = 0, 12 * parts, low * (parts + kept)
    if offloads(config):  # gradients go there too: as they come, and in float32
        host, optimizer, gradients = optimizer + 4 * parts + gradients, 0, 0
    if offloads(config, "param"):
        host, weights = host + low * parts, low * kept
    return weights, gradients, optimizer, host


def _buckets(parameters: Parameters, config: EngineConfig, gradients: int, freed: int) -> int:
    """Gradients on their way: ZeRO-1's sums over micro-batches, reduction buckets, ZeRO-3's gathered weights.

    Args:
        gradients: bytes counted already.
        freed: of activations and rows; what ZeRO-0 and 1 copy after the backward pass takes their place.
    """
    low, zero = width_of(config), config.deepspeed.get("zero_optimization", {})
    values = parameters.of_rank(config.ep_size)
    largest = max(weight.numel(config.ep_size) for weight in parameters.weights)
    if config.world_size == 1 and config.zero_stage == 0:
        return 0
    if config.zero_stage == 0:  # one flat copy; in low precision also float32 gradients for the step
        # 500,000,000 values are the bucket of DeepSpeed's buffered_allreduce_fallback.
        return max(0, min(values, 500_000_000) * low + (4 * values if low == 2 else 0) - freed)
    # DeepSpeed's defaults. With overlap_comm one bucket is filled while the other is reduced.
    bucket = int(zero.get("reduce_bucket_size", 5e8)) * (2 if zero.get("overlap_comm") else 1)
    if config.zero_stage == 1:
        summed = low * (values if config.accumulation_steps > 1 else 0)
        at_the_step = summed + low * min(bucket, values)
        return max(0, summed - gradients, at_the_step - (0 if zero.get("overlap_comm") else freed))
    if config.zero_stage == 2:
        return low * (bucket + largest)
    live = int(zero.get("stage3_max_live_parameters", 1e9)) + int(zero.get("stage3_prefetch_bucket_size", 5e7))
    return low * (min(values, live) + bucket + min(values, max(bucket, largest)))


def rows_of(config: EngineConfig) -> int:
    """Routed rows of one MoE layer, rank and micro-batch."""
    return config.tokens * config.run.rows_per_token


def moe_layers(run: RunConfig) -> int:
    """MoE layers L of the model."""
    return len(run.model.moe_blocks) if run.moe.facts.has_experts else 0


def dispatch_rows(config: EngineConfig, imbalance: float) -> int:
    """Rows sent and received, sorted and unsorted, that one layer holds while it exchanges them."""
    if not moe_layers(config.run):
        return 0
    return round(2 * rows_of(config) * (1 + imbalance) * config.run.model.width * width_of(config))


def activations(config: EngineConfig, imbalance: float) -> int:
    """Peak of what is held for backward: all that the forward pass keeps, and logits' gradients or a recomputed block.

    In two bytes gradients of logits take the place of the logits (models/loss.py).
    """
    run, low = config.run, width_of(config)
    logits = run.model.sequence_length * run.model.vocab_size * (4 + low if low == 4 else 0)
    again = max(_kept_by_block(config, imbalance)[0]) if run.train.activation_checkpointing else 0
    at_once = config.micro_batch * max(logits, again) // config.sp_size
    return kept(config, imbalance) + exchanged(config, imbalance) + at_once


def exchanged(config: EngineConfig, imbalance: float) -> int:
    """Bytes of exchanged rows that a recomputation takes from the first forward instead of from the other ranks."""
    run = config.run
    if config.ep_size == 1 or not run.train.activation_checkpointing:
        return 0
    sides = 1 + imbalance if run.moe.facts.weights_rows(run) else imbalance  # weights ask for the returned rows too
    return round(moe_layers(run) * rows_of(config) * sides * run.model.width * width_of(config))


def kept(config: EngineConfig, imbalance: float = 1.0) -> int:
    """Bytes that a forward pass keeps for backward. With recomputation: the blocks' inputs and what no block keeps."""
    run = config.run
    blocks, outside = _kept_by_block(config, imbalance)
    if run.train.activation_checkpointing:
        blocks = [run.model.sequence_length * run.model.width * width_of(config)] * len(blocks)
    return config.micro_batch * (sum(blocks) + outside) // config.sp_size + attention_mask(config)


def attention_mask(config: EngineConfig) -> int:
    """Bytes of the one mask of all blocks, over whole sequences; where documents are kept apart, one per sequence."""
    run, length = config.run, config.run.model.sequence_length
    if not (run.data.separate_documents or 0 < run.model.sliding_window < length):
        return 0
    return (config.micro_batch if run.data.separate_documents else 1) * length * length * width_of(config)


def _kept_by_block(config: EngineConfig, imbalance: float) -> tuple[list[int], int]:
    run, low = config.run, width_of(config)
    blocks, outside = _kept(run.model_dump_json(), torch.float32 if low == 4 else torch.bfloat16, imbalance)
    if config.sp_size > 1:  # attention's output is kept on both sides of its exchange
        blocks = [size + run.model.sequence_length * run.model.attention_width * low for size in blocks]
    return blocks, outside


@functools.cache
def _kept(run_json: str, dtype: torch.dtype, imbalance: float) -> tuple[list[int], int]:
    return meta_forward.kept_for_backward(thin_model(RunConfig.model_validate_json(run_json)), dtype, imbalance)


def codebook(config: EngineConfig, parameters: Parameters) -> int:
    """Buffers, float64 statistics of a step with room for their update, and samples kept to place codes."""
    run = config.run
    if not run.moe.facts.uses_codebook:
        return parameters.buffer_bytes
    layers, codes, width = code_shape(run)
    tokens = config.micro_batch * run.model.sequence_length
    samples = min(tokens, max(run.codebook.kmeans_samples, 4 * codes)) * config.accumulation_steps
    shared = run.codebook.source is not CodeSource.LAYER_STATE  # one tensor for all layers
    return parameters.buffer_bytes + 2 * code_statistics(run) + samples * width * 4 * (1 if shared else layers)


def code_shape(run: RunConfig) -> tuple[int, int, int]:
    """(L, K, C) of the codebooks."""
    book = run.codebook
    return moe_layers(run), book.num_codes or run.moe.num_experts, book.code_dim or run.source_width


def code_statistics(run: RunConfig) -> int:
    """Bytes of one step's float64 statistics ``[L, K, C + 1]``, all-reduced over all ranks."""
    layers, codes, width = code_shape(run)
    return 8 * layers * codes * (width + 1)

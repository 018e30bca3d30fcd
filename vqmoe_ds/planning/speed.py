"""Seconds of one optimizer step: a model with few terms, each a rate of the hardware, as ``ASSUMPTIONS`` lists them.

It orders layouts; it does not promise a wall-clock time.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.planning.hardware import GB, Cluster
from vqmoe_ds.planning.memory import Memory, moe_layers, offloads, width_of
from vqmoe_ds.planning.parameters import Parameters
from vqmoe_ds.planning.traffic import Over, Transfer, group_size, transfers

ASSUMPTIONS = """\
products run at {efficiency:.0%} of the peak; a backward pass costs two forward ones, recomputation one more
experts take the longer of their products and reading their weights (three times a micro-batch)
tokens spread evenly over experts, but for --imbalance: the busiest rank is waited for
a ring moves (n-1)/n of a tensor for a gather or a scatter, twice that for an all-reduce; an all-to-all (n-1)/n
bytes for other nodes share each processor's network link; a ring over several nodes runs at that link's rate
an all-to-all is never hidden; with overlap_comm gradients and ZeRO-3's gathers hide behind the backward pass
each call costs {latency:g} us a peer for an all-to-all, and as much for each doubling of the ranks for a ring
the optimizer reads and writes its state once, at memory bandwidth (offloaded: at the host link's)"""


@dataclass(frozen=True)
class LinkBytes:
    """Bytes one rank sends in a step, by where they go."""

    within_node: int
    between_nodes: int


@dataclass(frozen=True)
class Speed:
    """Seconds of a step by part; parts that hide behind others are already shortened by that."""

    parts: dict[str, float]
    links: LinkBytes
    tokens: int

    @property
    def step_seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def members(config: EngineConfig, over: Over, rank: int = 0) -> list[int]:
    """Global ranks of the group of ``rank``, as DeepSpeed orders them (E + D by default, D + E if the JSON asks).

    E + D: expert-parallel groups are consecutive ranks, so they fill nodes one after the other; replicas of an expert
    are ``ep_size`` ranks apart. tests/planning/test_dry_run.py compares with the groups that DeepSpeed makes.
    """
    world, ep = config.world_size, config.ep_size
    if over is Over.ALL:
        return list(range(world))
    if over is Over.SP:
        first = rank // config.sp_size * config.sp_size
        return list(range(first, first + config.sp_size))
    replicas = world // ep
    consecutive = (over is Over.EDP) if config.deepspeed.get("use_data_before_expert_parallelism") else over is Over.EP
    size, stride = (ep, replicas) if over is Over.EP else (replicas, ep)
    if consecutive:
        first = rank // size * size
        return list(range(first, first + size))
    return list(range(rank % stride, world, stride))


def sent(transfer: Transfer, config: EngineConfig, per_node: int) -> LinkBytes:
    """Bytes of rank 0 by link: to every member alike in an all-to-all, to the next one in a ring."""
    ranks = members(config, transfer.over)
    here = sum(rank // per_node == ranks[0] // per_node for rank in ranks)
    if transfer.kind == "all_to_all":
        share = transfer.payload // len(ranks)
        return LinkBytes(share * (here - 1), share * (len(ranks) - here))
    turns = 2 if transfer.kind == "all_reduce" else 1
    ring = turns * transfer.payload * (len(ranks) - 1) // len(ranks)
    return LinkBytes(ring, 0) if here == len(ranks) else LinkBytes(0, ring)


def seconds(transfer: Transfer, config: EngineConfig, cluster: Cluster) -> float:
    """Seconds of all calls of one transfer, none hidden."""
    links, ranks = sent(transfer, config, cluster.per_node), group_size(config, transfer.over)
    hops = ranks - 1 if transfer.kind == "all_to_all" else ranks.bit_length()
    within = links.within_node / (cluster.processor.link_gbps * GB)
    between = links.between_nodes / (cluster.network_gbps * GB)
    return max(within, between) + transfer.calls * hops * cluster.latency_us * 1e-6


def estimate(
    parameters: Parameters, config: EngineConfig, cluster: Cluster, memory: Memory, imbalance: float = 1.0
) -> Speed:
    """Time and traffic of one step.

    Args:
        imbalance: rows of the busiest rank's experts, relative to the mean.
    """
    moving, zero = transfers(parameters, config), config.deepspeed.get("zero_optimization", {})
    took = [(t, seconds(t, config, cluster)) for t in moving]
    backward, compute = _compute(parameters, config, cluster, imbalance)

    def of(*names: str) -> float:
        return sum(time for t, time in took if t.purpose.startswith(names))

    gathers = of("weights")
    behind = of("gradients") + (gathers if config.zero_stage == 3 else 0.0)
    hidden = min(behind, backward) if zero.get("overlap_comm", config.zero_stage == 3) else 0.0
    parts = {
        "compute": compute,
        "all-to-all": of("expert rows", "row counts") * imbalance + of("heads and positions", "expert numbers"),
        "gradients and gathers": behind - hidden,
        "new weights": 0.0 if config.zero_stage == 3 else gathers,
        "optimizer": _optimizer(config, cluster, memory),
        "codebook and norms": of("codebook", "norms"),
    }
    links = [sent(t, config, cluster.per_node) for t in moving]
    total = LinkBytes(sum(x.within_node for x in links), sum(x.between_nodes for x in links))
    return Speed(parts, total, config.run.train.batch_size * config.run.model.sequence_length)


def step_flops(parameters: Parameters, config: EngineConfig) -> int:
    """Floating-point operations of one step over all ranks, forward and backward, recomputation not counted."""
    tokens = config.run.train.batch_size * config.run.model.sequence_length
    return 3 * parameters.forward_flops_per_token * tokens


def _compute(parameters: Parameters, config: EngineConfig, cluster: Cluster, imbalance: float) -> tuple[float, float]:
    """(seconds of the backward passes, seconds of all products) of one rank's micro-batches."""
    run, processor = config.run, cluster.processor
    peak = (processor.tflops if width_of(config) == 2 else processor.fp32_tflops) * 1e12
    tokens = config.tokens * config.accumulation_steps
    experts = sum(w.numel() for w in parameters.weights if w.is_expert)
    # Values of experts that a token uses: of everything else it uses all that is stored.
    used = parameters.active - (parameters.stored - experts)
    expert_flops = 2 * used * tokens
    dense_flops = parameters.forward_flops_per_token * tokens - expert_flops
    rate = peak * cluster.efficiency
    read = experts // config.ep_size * width_of(config) * config.accumulation_steps / (processor.memory_gbps * GB)
    forward = dense_flops / rate + (max(expert_flops * imbalance / rate, read) if moe_layers(run) else 0.0)
    passes = 4 if run.train.activation_checkpointing else 3
    return (passes - 1) * forward, passes * forward


def _optimizer(config: EngineConfig, cluster: Cluster, memory: Memory) -> float:
    if offloads(config):
        return 2 * memory.host / (cluster.processor.host_gbps * GB)
    return 2 * (memory.optimizer + memory.gradients) / (cluster.processor.memory_gbps * GB)

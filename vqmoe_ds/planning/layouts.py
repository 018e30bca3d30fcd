"""Layouts that spread a model over a cluster, their needs, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vqmoe_ds.config.deepspeed_json import EngineConfig, check_sequence_parallel, in_words, placement_trouble
from vqmoe_ds.config.gpu import MOST_LOCAL_EXPERTS
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.planning import memory, speed, traffic
from vqmoe_ds.planning.hardware import GB, MOST_RANKS, Cluster
from vqmoe_ds.planning.memory import Memory
from vqmoe_ds.planning.parameters import Parameters, count
from vqmoe_ds.planning.speed import Speed
from vqmoe_ds.planning.traffic import Transfer
from vqmoe_ds.runtime.errors import ConfigError

USABLE = 0.92
"""Share of a device's memory that a run may fill; the rest is the driver's, NCCL's and fragmentation's."""


@dataclass(frozen=True)
class Choices:
    """Layouts to try; an empty field means all possible values."""

    stages: Sequence[int] = (1, 2, 3)
    ep_sizes: Sequence[int] = ()
    micro_batches: Sequence[int] = ()
    precision: str = "bf16"
    offload: Sequence[bool] = (False,)
    imbalance: float = 1.2
    on_gpu: bool = True
    """Leave out layouts with more local experts than grouped products of GPUs take."""


@dataclass(frozen=True)
class Plan:
    """One layout with its needs."""

    config: EngineConfig
    memory: Memory
    transfers: list[Transfer]
    speed: Speed
    fits: bool

    @property
    def name(self) -> str:
        offload = ", optimizer on the host" if memory.offloads(self.config) else ""
        return f"{self.config.sharing}ZeRO-{self.config.zero_stage}, EP {self.config.ep_size}{offload}"


def explore(run: RunConfig, cluster: Cluster, choices: Choices, base: dict[str, Any]) -> list[Plan]:
    """Plans of the fastest micro-batch that fits, for every stage, EP size and offload; fastest layout first.

    Where none fits, the smallest micro-batch stands for its layout, behind those that fit and by memory.

    Args:
        base: DeepSpeed JSON that bucket sizes, accumulation type and the like are taken from.

    Raises:
        ConfigError: a size that divides nothing, or no layout spreads the experts far enough for GPUs.
    """
    check_sequence_parallel(run, cluster.ranks)
    parameters = count(run)
    plans = []
    for ep_size in _ep_sizes(run, cluster, choices):
        for stage in choices.stages:
            for offload in choices.offload:
                same = [
                    measure(
                        parameters,
                        engine_config(run, cluster, choices, base, stage, ep_size, micro, offload),
                        cluster,
                        choices.imbalance,
                    )
                    for micro in _micro_batches(run, cluster, choices)
                ]
                fitting = [plan for plan in same if plan.fits]
                plans.append(
                    min(fitting, key=lambda p: p.speed.step_seconds)
                    if fitting
                    else min(same, key=lambda p: p.memory.device)
                )
    return sorted(plans, key=lambda p: (not p.fits, p.speed.step_seconds if p.fits else p.memory.device))


def remedies(run: RunConfig, cluster: Cluster, choices: Choices, base: dict[str, Any]) -> list[str]:
    """Changes that make some layout fit, each tried: larger processors, more nodes, offload, recomputation."""

    def best(run: RunConfig = run, cluster: Cluster = cluster, choices: Choices = choices) -> Plan:
        return explore(run, cluster, choices, base)[0]

    found = [f"processors of {math.ceil(best().memory.device / USABLE / GB)} GB"]
    if not any(choices.offload) and best(choices=replace(choices, offload=[True])).fits:
        found.append("--offload")
    train = run.train.model_copy(update={"activation_checkpointing": True})
    if not run.train.activation_checkpointing and best(run.model_copy(update={"train": train})).fits:
        found.append("--set train.activation_checkpointing=true")
    nodes = cluster.nodes
    while 2 * nodes * cluster.per_node <= MOST_RANKS and run.train.batch_size % (2 * nodes * cluster.per_node) == 0:
        nodes *= 2
        if best(cluster=replace(cluster, nodes=nodes)).fits:
            found.append(f"--nodes {nodes}")
            break
    return found


def measure(parameters: Parameters, config: EngineConfig, cluster: Cluster, imbalance: float) -> Plan:
    """Plan of one layout."""
    need = memory.estimate(parameters, config, 0, imbalance)
    fast = speed.estimate(parameters, config, cluster, need, imbalance)
    fits = need.device <= USABLE * cluster.processor.memory_gb * GB
    return Plan(config, need, traffic.transfers(parameters, config), fast, fits)


def engine_config(
    run: RunConfig,
    cluster: Cluster,
    choices: Choices,
    base: dict[str, Any],
    stage: int,
    ep_size: int,
    micro: int,
    offload: bool,
) -> EngineConfig:
    """The result of ``resolve`` for a JSON like ``base`` with another stage, precision, offload and micro-batch."""
    zero = {**base.get("zero_optimization", {}), "stage": stage}
    # A choice of the plan, as are stage and micro-batch, whatever base says.
    zero.pop("offload_optimizer", None)
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    # Under bf16, and under no other name of a precision.
    deepspeed = {key: value for key, value in base.items() if key not in ("fp16", "bfloat16")}
    deepspeed |= {"zero_optimization": zero, "bf16": {"enabled": choices.precision == "bf16"}}
    if stage != 2 or choices.precision == "fp32":  # float32 sums: at stage 1 another, larger optimizer
        deepspeed.pop("data_types", None)
    rounds = run.train.batch_size // (_readers(run, cluster) * micro)
    return EngineConfig(deepspeed, run, ep_size, cluster.ranks, micro, rounds)


def _readers(run: RunConfig, cluster: Cluster) -> int:
    """Groups of ranks that read different sequences."""
    return cluster.ranks // run.train.sequence_parallel_size


def _ep_sizes(run: RunConfig, cluster: Cluster, choices: Choices) -> list[int]:
    experts, ranks = run.moe.num_experts, cluster.ranks
    if not run.moe.facts.has_experts:
        experts = 1
    for size in choices.ep_sizes:
        if size < 1 or ranks % size:
            raise ConfigError(f"--ep_size {size} does not divide the {ranks} ranks of this cluster")
        if experts % size:
            raise ConfigError(f"--ep_size {size} does not divide moe.num_experts={experts}")
    possible = choices.ep_sizes or [n for n in range(1, ranks + 1) if ranks % n == 0 and experts % n == 0]
    sizes = [n for n in possible if not choices.on_gpu or experts // n <= MOST_LOCAL_EXPERTS]
    if not sizes:
        raise ConfigError(
            f"moe.num_experts={experts} leaves more than {MOST_LOCAL_EXPERTS} experts a GPU at every expert-parallel "
            f"size of {ranks} ranks, and grouped products take no more; plan for more ranks (--nodes)"
        )
    troubles = [placement_trouble(run, n) for n in sizes]
    if all(troubles):  # that of the largest size that ranks sharing sequences could have
        within = [t for n, t in zip(sizes, troubles, strict=True) if n <= run.train.sequence_parallel_size]
        raise ConfigError(str([*troubles[:1], *within][-1]))
    return [n for n, trouble in zip(sizes, troubles, strict=True) if trouble is None]


def _micro_batches(run: RunConfig, cluster: Cluster, choices: Choices) -> list[int]:
    total, readers = run.train.batch_size, _readers(run, cluster)
    if total % readers:
        ranks = in_words(readers, run.train.sequence_parallel_size)
        raise ConfigError(
            f"train.batch_size={total} is not a multiple of the {ranks} of this cluster; set it with "
            "--set train.batch_size=..."
        )
    share = total // readers
    for micro in choices.micro_batches:
        if micro < 1 or share % micro:
            raise ConfigError(f"--micro_batch {micro} does not divide the {share} sequences per rank and step")
    return list(choices.micro_batches) or [2**n for n in range(7) if share % 2**n == 0]

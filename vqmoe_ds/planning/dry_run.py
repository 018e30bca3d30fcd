"""``launchers/pretrain.py --dry_run``: build one rank of a large job on one small machine, and report its needs.

Real: the configuration's and DeepSpeed's own checks, process groups made by DeepSpeed over PyTorch's fake backend, the
model class on the meta device with this rank's experts, the optimizer groups, and one forward pass in which shapes run
through attention, routers, the (fake) all-to-all and the grouped products of GPUs. ``NOT_BUILT`` is the rest.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from vqmoe_ds.config.cli import config_from_args
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.refusals import check_by_deepspeed
from vqmoe_ds.planning.hardware import MOST_RANKS
from vqmoe_ds.runtime.device import ACCELERATOR
from vqmoe_ds.runtime.errors import ConfigError, reports_errors, shown

NOT_BUILT = [
    "data (model.vocab_size is that of the configuration)",
    "the DeepSpeed engine and its buffers (their sizes are counted, docs/planning.md)",
    "values: weights, codes and routes (experts get even shares of the rows)",
]


@dataclass(frozen=True)
class RankReport:
    """Contents and needs of one rank of a job."""

    rank: int
    node: int
    layout: dict[str, Any]
    expert_parallel_group: list[int]
    expert_data_parallel_group: list[int]
    sequence_parallel_group: list[int]
    all_to_all_within_node: bool
    expert_ids: list[int]
    """Ids of this rank's experts, the same in every MoE layer."""
    parameters: dict[str, int]
    """Values of this rank's weights: dense, experts; and of the whole model: stored, active."""
    bytes: dict[str, int]
    micro_batch: int
    accumulation_steps: int
    loss_shape: list[int]
    not_built: list[str]


@reports_errors
def main(args: argparse.Namespace) -> int:
    """Dry-run the rank that the command line names; returns the exit code."""
    if args.world_size is None:
        raise ConfigError("--dry_run needs --world_size, the ranks of the job that is meant")
    if not 1 <= args.world_size <= MOST_RANKS:
        raise ConfigError(f"--world_size {shown(args.world_size)} must be 1 to {MOST_RANKS:,}")
    loaded = config_from_args(args)
    loaded.print_notes()
    # A large job is one for GPUs, though none is here.
    gpu = os.environ.get(ACCELERATOR) != "cpu"
    config = resolve(args.ds_config, loaded, args.world_size, args.ep_size, gpu)
    report = dry_run(config, args.rank, args.gpus_per_node, args.ds_config)
    print(json.dumps(asdict(report), indent=1) if args.json else text(report))
    return 0


def dry_run(config: EngineConfig, rank: int, per_node: int, json_path: str) -> RankReport:
    """Build one rank of a job and report what it holds.

    Args:
        config: of the whole job.
        rank: number of the rank to build.
        per_node: ranks per node, numbered node by node.
        json_path: path of the DeepSpeed JSON, for error messages.

    Raises:
        ConfigError: a rank that is none, or a JSON that DeepSpeed refuses.
    """
    _check_rank(rank, config.world_size, per_node)
    # Heavy imports only now: bad input has been answered.
    import torch
    import torch.distributed as dist

    from vqmoe_ds.models.ulysses import sequence_share
    from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer
    from vqmoe_ds.planning import memory, meta_forward
    from vqmoe_ds.planning.parameters import count, meta_model

    with fake_ranks(rank, config.world_size):
        # Within the group: DeepSpeed holds the batch sizes against the world size that it has, and 1 without one.
        check_by_deepspeed(config.deepspeed, json_path)
        model = meta_model(config.run, config.ep_size, config.ep_rank(rank), DeepSpeedMoELayer)
        share, sequence_group = sequence_share(config.run, rank), [rank]
        if share is not None:
            model.share_sequences(share)
            sequence_group = dist.get_process_group_ranks(share.group)
        ep_group, edp_group = _bind_groups(model, config, rank)
        _optimizer_groups(model, config)
        loss = meta_forward.run(model, meta_forward.cast_weights(model, torch.bfloat16), config.micro_batch)
    parameters = count(config.run)
    need = memory.estimate(parameters, config, rank)
    return RankReport(
        rank,
        rank // per_node,
        config.layout(),
        ep_group,
        edp_group,
        sequence_group,
        len({member // per_node for member in ep_group}) == 1,
        _expert_ids(model),
        {**_values_of_rank(model), "stored": parameters.stored, "active": parameters.active},
        {**asdict(need), "device": need.device},
        config.micro_batch,
        config.accumulation_steps,
        list(loss.shape),
        NOT_BUILT,
    )


def _check_rank(rank: int, world: int, per_node: int) -> None:
    if not 0 <= rank < world:
        raise ConfigError(f"--rank {shown(rank)} is not one of the {world} ranks 0 to {world - 1}")
    if per_node < 1:
        raise ConfigError(f"--gpus_per_node {shown(per_node)} must be at least 1")


def _values_of_rank(model: Any) -> dict[str, int]:
    dense = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name)
    return {"dense": dense, "experts": sum(p.numel() for p in model.parameters()) - dense}


@contextmanager
def fake_ranks(rank: int, world: int) -> Iterator[None]:
    """A default process group of ``world`` ranks of which only this one exists; its collectives do nothing."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.comm import comm
    from deepspeed.utils import groups
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from vqmoe_ds.runtime.torch_setup import build_no_shared_memory_op

    build_no_shared_memory_op()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        # Discovery would start MPI (mpi4py) where no launcher has set variables.
        deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False, dist_init_required=False)
        yield
    finally:
        # DeepSpeed keeps groups by name as long as the process lives: the next dry run would get those of this one.
        for made in (groups._get_expert_parallel_group_dict(), groups._get_expert_data_parallel_group_dict()):
            made.clear()
        for made in (groups._EXPERT_PARALLEL_GROUP_RANKS, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS):
            made.clear()
        comm.cdb = None
        dist.destroy_process_group()


def _bind_groups(model: Any, config: EngineConfig, rank: int) -> tuple[list[int], list[int]]:
    """Have every layer bind its groups as the engine does; members of this rank's two groups."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    for layer in model.moe_layers():
        layer.set_deepspeed_parallelism(bool(config.deepspeed.get("use_data_before_expert_parallelism")))
    name = f"ep_size_{config.ep_size}"
    if name not in groups._get_expert_parallel_group_dict():  # a dense model
        return [rank], list(range(config.world_size))
    return (
        dist.get_process_group_ranks(groups._get_expert_parallel_group(name)),
        dist.get_process_group_ranks(groups._get_expert_data_parallel_group(name)),
    )


def _optimizer_groups(model: Any, config: EngineConfig) -> list[int]:
    """Values of each of the optimizer's groups, split by DeepSpeed as the engine does."""
    from deepspeed.moe.utils import configure_moe_param_groups

    from vqmoe_ds.models.parameter_groups import parameter_groups

    named = parameter_groups(model, config.run.train.weight_decay, config.run.train.decay_gates)
    split = configure_moe_param_groups(named) if model.moe_layers() else named
    return [size for size in (sum(p.numel() for p in group["params"]) for group in split) if size]


def _expert_ids(model: Any) -> list[int]:
    """Global ids, as the layer itself tells DeepSpeed's checkpoints."""
    from deepspeed.checkpoint.constants import AUTOEP_PARAM_LOCAL_EXPERTS, DS_AUTOEP_UC_META

    layers = model.moe_layers()
    return list(getattr(layers[0].experts.w1, DS_AUTOEP_UC_META)[AUTOEP_PARAM_LOCAL_EXPERTS]) if layers else []


def text(report: RankReport) -> str:
    """The report for people."""
    from vqmoe_ds.planning.hardware import GB

    layout, ids, sharing = report.layout, report.expert_ids, report.sequence_parallel_group
    place = "stays on the node" if report.all_to_all_within_node else "crosses nodes"
    head = (
        f"rank {report.rank} of {layout['world_size']} (node {report.node}): ZeRO-{layout['zero_stage']}, "
        f"EP {layout['ep_size']}, {layout['precision']}, micro-batch {report.micro_batch} x {report.accumulation_steps}"
    )
    lines = [
        head,
        f"experts of each layer: {_range(ids)}; expert-parallel group: ranks {_range(report.expert_parallel_group)}, "
        f"its all-to-all {place}",
        f"replicas of these experts: ranks {_range(report.expert_data_parallel_group)}",
        *([f"ranks that share its sequences: {_range(sharing)}"] if len(sharing) > 1 else []),
        "parameters: " + ", ".join(f"{name} {number:,}" for name, number in report.parameters.items()),
        "GB: " + ", ".join(f"{part} {size / GB:.2f}" for part, size in report.bytes.items()),
        f"one forward pass on meta tensors ran through; loss of shape {report.loss_shape}",
        "not built: " + "; ".join(report.not_built),
    ]
    return "\n".join(lines)


def _range(numbers: list[int]) -> str:
    """Equally spaced numbers as ``a..b`` or ``a, b, ..., z``."""
    if len(numbers) < 4:
        return ", ".join(map(str, numbers)) or "none"
    if numbers[1] - numbers[0] == 1:
        return f"{numbers[0]}..{numbers[-1]}"
    return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]} ({len(numbers)})"

"""Set-up of torch, DeepSpeed and the model, and the few engine internals the loop needs."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from pydantic import ValidationError
from torch import Tensor, nn

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.errors import ConfigError
from vqmoe_ds.models.build import build_model
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.codebook_sync import CodebookSync
from vqmoe_ds.moe.deepspeed_layer import clip_over_all_experts
from vqmoe_ds.moe.router_sync import RouterSync
from vqmoe_ds.train.ranks import Place
from vqmoe_ds.train.watchdog import meet


@dataclass
class Session:
    """Everything a training loop holds on to."""

    config: EngineConfig
    place: Place
    engine: Any
    model: MoETransformer
    sync: CodebookSync | RouterSync | None
    """Moves what is learned from statistics of all ranks: codebooks, or routers with state."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    def mean_over_ranks(self, values: list[float]) -> list[float]:
        """Average of host numbers over all ranks, in float64; NaN on one rank is NaN on all."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.place.world_size > 1:
            deepspeed.comm.all_reduce(tensor)
        return [float(v) for v in tensor / self.place.world_size]

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        if self.place.world_size > 1:
            deepspeed.comm.all_reduce(total)
        return total


def set_up_torch(place: Place, start_timeout: float = 300.0) -> None:
    """Threads, quiet libraries and process group. Call before building anything.

    Args:
        start_timeout: as ``run.start_timeout``.

    Raises:
        PeerLost: the ranks do not find each other in that time.
    """
    warnings.filterwarnings("ignore")
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // place.local_world_size))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Or every empty buffer would be written once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # DeepSpeed would compile its shared-memory all-reduce now (about a minute of g++ at the first launch). Gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = get_accelerator().communication_backend_name()
        meet(place, backend, start_timeout)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)


def build_session(config: EngineConfig, place: Place, json_path: str) -> Session:
    """Model, optimizer and DeepSpeed engine, with codebooks and routers made equal on all ranks.

    Raises:
        ConfigError: DeepSpeed refuses its JSON, or the hardware cannot do what it asks.
    """
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError(f"DeepSpeed config {json_path}: fp16 needs a GPU; use bf16 or neither on CPU")
    torch.manual_seed(config.run.train.seed)
    model = build_model(config.run, config.ep_size, config.ep_rank(place.rank))
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, config.run.train.weight_decay),
            config=config.deepspeed,
            dist_init_required=False,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"DeepSpeed config {json_path}: {where}: {first['msg']}") from None
    if config.zero_stage == 0 and config.precision == "fp32":
        clip_over_all_experts(engine)
    sync: CodebookSync | RouterSync | None = RouterSync.of(model)
    if model.bank is not None:
        sync = CodebookSync(model.bank, config.accumulation_steps)
    if sync is not None:
        sync.broadcast()
    return Session(config, place, engine, model, sync)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two named groups of what learns: matrices decay, vectors do not. DeepSpeed splits experts off each by itself."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def apply_step(engine: Any, finite: bool) -> bool:
    """Finish an accumulation boundary; return whether the weights moved.

    ZeRO 1 to 3 drop a step whose gradients are not finite by themselves. At stage 0 there is no such check, so the
    gradients are thrown away here.
    """
    if engine.zero_optimization():
        engine.step()
        return not bool(getattr(engine.optimizer, "overflow", False))
    if finite:
        finite = _gradients_finite(engine)
    if finite:
        engine.step()
        return True
    engine.zero_grad()
    engine.optimizer.zero_grad()
    if hasattr(engine.optimizer, "clear_hp_grads"):
        engine.optimizer.clear_hp_grads()
    engine.micro_steps += 1
    engine.skipped_steps += 1
    return False


def _gradients_finite(engine: Any) -> bool:
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    bad = torch.zeros((), device=engine.device)
    for grad in grads:
        bad = torch.maximum(bad, (~torch.isfinite(grad.sum())).float())
    if dist.get_world_size() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bool(bad)

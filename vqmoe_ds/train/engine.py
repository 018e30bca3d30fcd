"""Set-up of model and DeepSpeed engine, and the few engine internals the loop needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.refusals import check_by_deepspeed, refusals
from vqmoe_ds.models.build import build_model
from vqmoe_ds.models.parameter_groups import parameter_groups
from vqmoe_ds.models.session import Session
from vqmoe_ds.models.ulysses import sequence_share
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer, StoredDeepSpeedMoELayer, clip_over_all_experts
from vqmoe_ds.moe.expert_file import experts_in_file
from vqmoe_ds.moe.state_sync import StateSync
from vqmoe_ds.planning.host import expert_memory
from vqmoe_ds.runtime.device import uses_gpu
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.ranks import Place
from vqmoe_ds.train.compiling import check_nvme
from vqmoe_ds.train.zero import frozen_experts_allowed, import_optimizers, spare_passes


def build_session(config: EngineConfig, place: Place, json_path: str) -> Session:
    """Model, optimizer and DeepSpeed engine, with codebooks and routers made equal on all ranks.

    Raises:
        ConfigError: DeepSpeed refuses its JSON or the model, or the hardware cannot do what it asks.
    """
    if config.precision == "fp16" and not uses_gpu():
        raise ConfigError(f"DeepSpeed config {json_path}: fp16 needs a GPU; use bf16 or neither on CPU")
    check_by_deepspeed(config.deepspeed, json_path)
    check_nvme(config.deepspeed, json_path)
    # The same on all ranks: replicated weights start equal, and experts are drawn by their global number.
    torch.manual_seed(config.run.train.seed)
    memory = expert_memory(config.run)
    layer_class = DeepSpeedMoELayer if memory is None else StoredDeepSpeedMoELayer
    model = build_model(config.run, config.ep_size, config.ep_rank(place.rank), layer_class)
    refuse_scalars(model)
    if memory is not None:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        model.expert_store = experts_in_file(model.moe_layers(), Path(config.run.run.run_dir), dtype, memory)
    share = sequence_share(config.run, place.rank)
    if share is not None:
        model.share_sequences(share)
    import_optimizers(config.deepspeed["optimizer"]["type"])
    with refusals(json_path), frozen_experts_allowed():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, config.run.train.weight_decay, config.run.train.decay_gates),
            config=config.deepspeed,
            dist_init_required=False,
        )
    # Now, while the groups have the rates of the JSON, which the schedule overwrites.
    engine.rate_shares = rate_shares(engine, config.run.train.learning_rate)
    spare_passes(engine)
    if config.zero_stage == 0:
        # Of any model: DeepSpeed reports no norm of float32 gradients.
        clip_over_all_experts(engine)
        # Before a checkpoint is loaded, whose master weights and counts of steps this would overwrite.
        undo_empty_step(engine.optimizer)
    if config.precision == "fp16":
        fix_loss_scaling(engine)
    sync = StateSync(model, config.accumulation_steps)
    # After the engine, which broadcasts parameters but not the buffers of codebooks and routers.
    sync.broadcast()
    return Session(config, place, engine, model, sync)


def refuse_scalars(model: nn.Module) -> None:
    """Refuse a weight without dimensions, as a router from outside may have, before DeepSpeed blames its JSON for it.

    Raises:
        ConfigError: there is one.
    """
    for name, param in model.named_parameters():
        if param.dim() == 0:
            raise ConfigError(
                f"the parameter {name} has no dimensions, and DeepSpeed cannot broadcast it: give it shape [1]"
            )


def undo_empty_step(optimizer: Any) -> None:
    """Undo the step with which DeepSpeed's 16-bit optimizers of stage 0 create their state.

    Its gradients are zero, but Adam counts it, and it decays the weights.
    """
    if not isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        return
    # From the 16-bit weights, which that step did not write.
    optimizer.refresh_fp32_params()
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0


def rate_shares(engine: Any, rate: float) -> list[float]:
    """Learning rate of each parameter group of a new engine as a share of ``rate``: others than 1 are Muon's
    (``muon_lr``, ``adam_lr``)."""
    return [group["lr"] / rate for group in engine.optimizer.param_groups]


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the rate of the schedule; groups keep their shares of it."""
    for group, share in zip(engine.optimizer.param_groups, engine.rate_shares, strict=True):
        group["lr"] = rate * share


def checks_gradients(engine: Any) -> bool:
    """Whether the loop must look for gradients that are not finite: at stage 0 in fp32 and bf16 the engine steps
    whatever they are. ZeRO 1 to 3, and fp16 at stage 0, drop such a step by themselves."""
    return not (engine.zero_optimization() or engine.fp16_enabled())


def gradients_bad(engine: Any) -> Tensor:
    """1 where a gradient of this rank is not finite, else 0: a scalar on the device."""
    # A NaN or infinite term makes the sum so; a test of every value would write a mask for each gradient.
    sums = [param.grad.sum().float() for param in engine.module.parameters() if param.grad is not None]
    return (~torch.isfinite(torch.stack(sums))).any().double()


def apply_step(engine: Any, finite: bool) -> bool:
    """Finish an accumulation boundary; return whether the weights moved.

    Args:
        finite: losses and gradients are, on all ranks; read where ``checks_gradients``: else gradients are thrown away.
    """
    if not checks_gradients(engine):
        # Of DeepSpeed's optimizers this one alone keeps the norm of scaled gradients. Before the step, which may change
        # the scale after taking the norm.
        scale = engine.optimizer.loss_scale if isinstance(engine.optimizer, FP16_UnfusedOptimizer) else 1.0
        engine.step()
        if scale != 1.0:
            engine._global_grad_norm = engine._global_grad_norm / scale
        return not bool(getattr(engine.optimizer, "overflow", False))
    if finite:
        engine.step()
        return True
    # What engine.step() does at a boundary besides the update; micro_steps decides where the next boundary is.
    engine.zero_grad()
    engine.optimizer.zero_grad()
    if hasattr(engine.optimizer, "clear_hp_grads"):
        engine.optimizer.clear_hp_grads()
    engine.micro_steps += 1
    engine.skipped_steps += 1
    return False


def fix_loss_scaling(engine: Any) -> None:
    """Close two gaps of DeepSpeed 0.19.8's fp16.

    At stage 0 its optimizer divides gradients by the loss scale, and ``engine.backward`` scales losses for ZeRO's
    optimizers alone, so it is done here. At stages 1 to 3 an overflow at the smallest scale raises a bare exception;
    it becomes a step that is not taken.
    """
    if engine.zero_optimization():
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        return
    backward = engine.backward
    engine.backward = lambda loss, **options: backward(loss * engine.optimizer.loss_scale, **options)


def searches_loss_scale(engine: Any) -> bool:
    """Whether a step with a finite loss that was not taken belongs to fp16's search for a loss scale.

    The scale starts high (2^16) and falls until no gradient overflows, and now and then it rises to try again: such
    steps are no sign of trouble, unless the scale is fixed or cannot fall any more.
    """
    if not engine.fp16_enabled():
        return False
    optimizer = engine.optimizer
    if hasattr(optimizer, "loss_scale_config"):  # stage 0
        scale = optimizer.loss_scale_config
        return bool(scale.dynamic_loss_scale and scale.cur_scale > scale.min_loss_scale)
    scaler = optimizer.loss_scaler
    return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)

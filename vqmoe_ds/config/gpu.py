"""Requirements of the processor on a configuration: fused Adam; on GPUs widths of grouped products, and bf16.

``torch._grouped_mm`` (PyTorch 2.11 to 2.13, ``aten/src/ATen/native/GroupedMMUtils.h``) wants rows that start at
multiples of 16 bytes.
"""

from __future__ import annotations

import math
from typing import Any

from vqmoe_ds.config.deepspeed_values import ADAMS, OPTIMIZERS, OWN_ADAM_ALONE
from vqmoe_ds.config.schema import Precision, RunConfig
from vqmoe_ds.runtime.errors import ConfigError, shown

WIDTH_STEP = {"bf16": 8, "fp16": 8, "fp32": 4}
"""16 bytes, in values."""
MOST_LOCAL_EXPERTS = 1023
"""Groups of one ``torch._grouped_mm``."""
WIDEST_FUSED_HEAD = 256
"""Features of an attention head that flash attention takes."""


def check_widths(run: RunConfig, precision: str, ep_size: int = 1) -> None:
    """Refuse experts that the grouped products of GPUs cannot take.

    Args:
        precision: bf16, fp16 or fp32.
        ep_size: ranks over which the experts are spread.

    Raises:
        ConfigError: a width that is no multiple of 16 bytes (the next one is named), or too many experts per GPU.
    """
    if not run.moe.facts.has_experts:
        return
    model, step, local = run.model, WIDTH_STEP[precision], run.moe.num_experts // ep_size
    good = step if model.head_width else math.lcm(step, 2 * model.heads)  # heads take an even share each
    for name, width, next_to in (
        ("model.width", model.width, good),
        ("moe.expert_hidden", run.moe.expert_hidden, step),
    ):
        if width % step:
            raise ConfigError(
                f"{name}={width} is not a multiple of {step}, as grouped products on a GPU need in {precision}; "
                f"use {-(-width // next_to) * next_to}"
            )
    if local > MOST_LOCAL_EXPERTS:
        raise ConfigError(
            f"moe.num_experts={run.moe.num_experts} over expert-parallel size {ep_size} leaves {local} experts per "
            f"GPU, and grouped products take {MOST_LOCAL_EXPERTS}; raise --ep_size"
        )


def attention_hint(run: RunConfig, precision: str) -> str | None:
    """A sentence on why attention would keep all scores in memory; None where a fused kernel takes it.

    Flash attention (bf16, fp16) pads heads to multiples of 8; the memory-efficient kernel, the only one for fp32, takes
    multiples of 4 (ATen ``sdp_utils.cpp``). What neither takes is computed, slower, by PyTorch's formula.
    """
    width, low = run.model.attention_width // run.model.heads, precision != "fp32"
    if width % WIDTH_STEP[precision] == 0 or (low and width <= WIDEST_FUSED_HEAD):
        return None
    step = WIDTH_STEP[precision]
    return (
        f"no fused attention for heads of width {width} in {precision}: scores of all pairs of positions are kept; "
        f"a multiple of {step} is faster (model.head_width)"
    )


def set_precision(values: dict[str, Any], wanted: Precision, path: str) -> None:
    """Write ``train.precision`` into a DeepSpeed JSON that says nothing of it.

    Raises:
        ConfigError: it says something else.
    """
    if wanted is Precision.AUTO:
        return
    there = next((name for name in ("bf16", "fp16") if values.get(name, {}).get("enabled")), "fp32")
    if {"bf16", "fp16"} & values.keys():
        if there != wanted:
            raise ConfigError(
                f"train.precision={wanted} (--precision) contradicts {there} in DeepSpeed config {path}; take its "
                "sections bf16 and fp16 out, or leave the option out"
            )
    elif wanted is Precision.BF16:
        use_bf16(values)
    else:
        values["bf16" if wanted is Precision.FP32 else "fp16"] = {"enabled": wanted is Precision.FP16}


def use_bf16(values: dict[str, Any]) -> None:
    """Turn bf16 on in a DeepSpeed JSON that says nothing of precision; ``"bf16": {"enabled": false}`` is fp32.

    Sums over micro-batches are float32 at ZeRO-2 and 3: without, ZeRO-2 also keeps whole gradients of which a rank
    needs a part. Stage 0 has no such sums, stage 1 would become another optimizer (DeepSpeed's ``BF16_Optimizer``), and
    with the optimizer on the host none were tried.
    """
    if "bf16" in values or "fp16" in values:
        return
    values["bf16"] = {"enabled": True}
    if int(values.get("zero_optimization", {}).get("stage", 0)) >= 2 and not _offloads(values):
        values["data_types"] = {"grad_accum_dtype": "fp32", **values.get("data_types", {})}


def check_optimizer_runs(values: dict[str, Any], gpu: bool, path: str) -> None:
    """Refuse types that nobody has, DeepSpeed's own kernels of a GPU on a CPU, and Muon whose checkpoints nobody reads.

    Raises:
        ConfigError: an unknown type; Lamb, or Lion that is not offloaded; Muon at ZeRO 0 in 16 bits.
    """
    kind = str(values["optimizer"]["type"])
    if not _exists(kind):
        raise ConfigError(
            f"DeepSpeed config {path}: optimizer.type {shown(kind)[1:-1]} is neither DeepSpeed's nor torch.optim's; "
            f"take one of {', '.join(OPTIMIZERS.values())}"
        )
    low = any(values.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    if kind == "Muon" and low and not values.get("zero_optimization", {}).get("stage"):
        # Its files number the master weights in Muon's order, without their names.
        raise ConfigError(f"DeepSpeed config {path}: Muon in 16 bits needs ZeRO 1 to 3; set zero_optimization.stage")
    if gpu or kind not in ("Lamb", "Lion") or (kind == "Lion" and _offloads(values)):
        return
    remedy = ' (on the host with zero_optimization.offload_optimizer {"device": "cpu"})' if kind == "Lion" else ""
    raise ConfigError(
        f"DeepSpeed config {path}: optimizer {kind} is a kernel for GPUs in DeepSpeed{remedy}; on a CPU take another"
    )


def _exists(kind: str) -> bool:
    if kind.lower() in OPTIMIZERS:
        return True
    import torch  # seconds, for types that were not tried

    return hasattr(torch.optim, kind)


def choose_adam(values: dict[str, Any]) -> None:
    """Choose PyTorch's Adam, fused, where the JSON says nothing of it: DeepSpeed's own is compiled at its first use.

    Fused, it updates the weights in one pass over memory; DeepSpeed hands the option through to ``torch.optim``
    (``get_optimizer_configuration``). One on the host (``offload_optimizer``) stays DeepSpeed's, whose loop is faster.
    """
    optimizer = values.get("optimizer", {})
    params = optimizer.get("params", {})
    if str(optimizer.get("type", "")).lower() not in ADAMS or _offloads(values):
        return
    if not OWN_ADAM_ALONE & params.keys():
        params.setdefault("torch_adam", True)
    if params.get("torch_adam") and not {"fused", "foreach"} & params.keys():
        params["fused"] = True


def _offloads(values: dict[str, Any]) -> bool:
    section = values.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device", "none") != "none"

"""Kinds of the values in a DeepSpeed JSON that are read before DeepSpeed checks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vqmoe_ds.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words, and whether it is."""

    words: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


OBJECT = Kind("a JSON object", lambda v: isinstance(v, dict))
OBJECT_OR_NULL = Kind("a JSON object or null", lambda v: v is None or isinstance(v, dict))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
TEXT = Kind("text", lambda v: isinstance(v, str))
NUMBER = Kind('a number or "auto"', lambda v: v == "auto" or _number(v))
WHOLE = Kind('a whole number or "auto"', lambda v: v == "auto" or _whole(v))
STAGE = Kind("0, 1, 2 or 3", lambda v: _whole(v) and 0 <= v <= 3)
BETAS = Kind(
    'a list of two numbers or "auto"',
    lambda v: v == "auto" or (isinstance(v, list) and len(v) == 2 and all(map(_number, v))),
)

KINDS = {
    **dict.fromkeys(("optimizer", "scheduler", "optimizer.params", "scheduler.params"), OBJECT),
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "data_types", "zero_optimization", "expert_parallel"), OBJECT),
    **dict.fromkeys(("activation_checkpointing", "checkpoint"), OBJECT),
    **dict.fromkeys(("zero_optimization.offload_optimizer", "zero_optimization.offload_param"), OBJECT_OR_NULL),
    **dict.fromkeys(("fp16.enabled", "bf16.enabled", "bfloat16.enabled", "expert_parallel.enabled"), FLAG),
    **dict.fromkeys((f"optimizer.params.{name}" for name in ("fused", "foreach", "torch_adam")), FLAG),
    **dict.fromkeys(("optimizer.type", "data_types.grad_accum_dtype"), TEXT),
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), WHOLE),
    **dict.fromkeys(("gradient_clipping", "optimizer.params.lr", "optimizer.params.weight_decay"), NUMBER),
    "optimizer.params.eps": NUMBER,
    "optimizer.params.betas": BETAS,
    "zero_optimization.stage": STAGE,
    "expert_parallel.autoep_size": Kind("a whole number", _whole),
}
"""Dotted keys; a section stands before what is in it."""


def check_values(path: str, values: dict[str, Any]) -> None:
    """Refuse values of another kind, and options that exclude each other.

    Args:
        path: of the JSON, for the sentence.
        values: the JSON; what is missing is not checked.

    Raises:
        ConfigError: the key, and what it must be.
    """
    for name, kind in KINDS.items():
        *sections, key = name.split(".")
        holder: Any = values
        for section in sections:
            holder = holder.get(section, {})
        if key in holder and not kind.holds(holder[key]):
            raise ConfigError(f"DeepSpeed config {path}: {name} must be {kind.words}, not {holder[key]!r}")
    if "bf16" in values and "bfloat16" in values:
        raise ConfigError(f"DeepSpeed config {path}: bfloat16 is another name of bf16; give one of the two")
    enabled = [name for name in ("bf16", "bfloat16", "fp16") if values.get(name, {}).get("enabled")]
    if len(enabled) > 1:
        raise ConfigError(f"DeepSpeed config {path}: {enabled[0]} and {enabled[1]} are both enabled; enable one")
    params = values.get("optimizer", {}).get("params", {})
    if params.get("fused") and params.get("foreach"):
        raise ConfigError(f"DeepSpeed config {path}: optimizer.params has both fused and foreach; give one of the two")

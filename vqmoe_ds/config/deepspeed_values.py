"""Kinds of the values in a DeepSpeed JSON that are read before DeepSpeed checks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vqmoe_ds.config.meanings import IN_PARAMS, nearest_key
from vqmoe_ds.runtime.errors import ConfigError, shown


@dataclass(frozen=True)
class Kind:
    """A kind of value: its words for an error sentence, and the test of a value."""

    words: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    # To Python a bool is an int.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


OBJECT = Kind("a JSON object", lambda v: isinstance(v, dict))
OBJECT_OR_NULL = Kind("a JSON object or null", lambda v: v is None or isinstance(v, dict))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
TEXT = Kind("text", lambda v: isinstance(v, str))
NUMBER = Kind('a number or "auto"', lambda v: v == "auto" or _number(v))
STAGE = Kind("0, 1, 2 or 3", lambda v: _whole(v) and 0 <= v <= 3)
# Sizes are often written 5e8, which JSON reads as a float; past 2^53 floats skip whole numbers.
SIZE = Kind("a whole number of 0 to 2^53", lambda v: _number(v) and 0 <= v <= 2**53 and v == int(v))
POSITIVE = Kind('a whole number of 1 to 2^30, or "auto"', lambda v: v == "auto" or (_whole(v) and 1 <= v <= 2**30))
NOT_NEGATIVE = Kind('a number of 0 or more, or "auto"', lambda v: v == "auto" or (_number(v) and v >= 0))
BETAS = Kind(
    'a list of two numbers or "auto"',
    lambda v: v == "auto" or (isinstance(v, list) and len(v) == 2 and all(map(_number, v))),
)

_SIZES = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
_FLAGS = (
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "prescale_gradients",
    "disable_allgather",
    "disable_python_gc",
    "sparse_gradients",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "use_data_before_expert_parallelism",
    "dataloader_drop_last",
    "managed_gradient_accumulation",
    "zero_optimization.overlap_comm",
)
_ADAM_FLAGS = (
    "fused",
    "foreach",
    "torch_adam",
    "amsgrad",
    "maximize",
    "capturable",
    "differentiable",
    "adam_w_mode",
    "bias_correction",
    "set_grad_none",
)
_ANY_ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad", "adam_w_mode", "torch_adam", "fp32_optimizer_states")
_TORCH_ADAM = (*_ANY_ADAM, "fused", "foreach", "maximize", "capturable", "differentiable")
OWN_ADAM_ALONE = {"bias_correction", "set_grad_none"}
"""Options of DeepSpeed's Adam that PyTorch's does not have; a JSON that gives one gets DeepSpeed's."""
_OWN_ADAM = (*_ANY_ADAM, *sorted(OWN_ADAM_ALONE))
_LAMB = ("bias_correction", "eps", "eps_inside_sqrt", "max_coeff", "min_coeff", "amsgrad")
OPTIMIZERS = {
    name.lower(): name
    for name in ("Adam", "AdamW", "Muon", "Adagrad", "Lion", "Lamb", "SGD", "RMSprop", "NAdam", "RAdam", "Adamax")
}
"""``optimizer.type`` in small letters -> as DeepSpeed, or ``torch.optim``, has it: those that were tried
(tests/train/test_optimizers.py)."""
ADAMS = ("adam", "adamw")
"""Optimizers whose checkpoints any layout goes on from."""
SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
"""``scheduler.type`` of DeepSpeed 0.19.8; at ZeRO 0 those of ``torch.optim.lr_scheduler`` work, too."""
WITHOUT_BETAS = ("adagrad", "sgd", "rmsprop", "adafactor", "adadelta", "asgd")
IMPOSSIBLE = {
    **dict.fromkeys(("muadam", "muadamw", "musgd"), "scales by the base shapes of muP, which models here do not have"),
    "lbfgs": "evaluates the loss several times a step",
    "sparseadam": "takes sparse gradients alone",
    **dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), "is not in DeepSpeed 0.19.8 any more"),
}
"""``optimizer.type`` that DeepSpeed 0.19.8 would make, or former versions made, in small letters -> why it cannot train
here."""
PARAMS = {
    "lamb": ("lr", "betas", "weight_decay", *_LAMB),
    "lion": ("lr", "betas", "weight_decay", "set_grad_none"),
}
"""``optimizer.params`` by type, in small letters: the arguments of DeepSpeed 0.19.8's optimizers. Adam's and AdamW's
depend on ``torch_adam``; those of other types are left to DeepSpeed."""

KINDS = {
    **dict.fromkeys(("optimizer", "scheduler", "optimizer.params", "scheduler.params"), OBJECT),
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "data_types", "zero_optimization", "expert_parallel"), OBJECT),
    **dict.fromkeys(("activation_checkpointing", "checkpoint", "autotuning", "aio"), OBJECT),
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor", "comms_logger", "flops_profiler"), OBJECT),
    **dict.fromkeys(("compile", "timers", "weight_quantization"), OBJECT),
    **dict.fromkeys((f"{name}.enabled" for name in ("tensorboard", "wandb", "comet", "csv_monitor")), FLAG),
    **dict.fromkeys(("zero_optimization.offload_optimizer", "zero_optimization.offload_param"), OBJECT_OR_NULL),
    **dict.fromkeys(("fp16.enabled", "bf16.enabled", "bfloat16.enabled", "expert_parallel.enabled"), FLAG),
    **dict.fromkeys((f"optimizer.params.{name}" for name in _ADAM_FLAGS), FLAG),
    **dict.fromkeys(_FLAGS, FLAG),
    **dict.fromkeys(("optimizer.type", "scheduler.type", "data_types.grad_accum_dtype"), TEXT),
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), POSITIVE),
    **dict.fromkeys(("gradient_clipping", "optimizer.params.lr", "optimizer.params.weight_decay"), NUMBER),
    **dict.fromkeys((f"zero_optimization.{name}" for name in _SIZES), SIZE),
    **dict.fromkeys((f"flops_profiler.{name}" for name in ("profile_step", "top_modules")), SIZE),
    "zero_optimization.sub_group_size": Kind("a whole number of 1 to 2^53", lambda v: SIZE.holds(v) and v > 0),
    "optimizer.params.eps": NOT_NEGATIVE,
    "gradient_predivide_factor": Kind("a number above 0", lambda v: _number(v) and v > 0),
    "steps_per_print": Kind("a whole number of 1 or more, or null", lambda v: v is None or (_whole(v) and v > 0)),
    "optimizer.params.betas": BETAS,
    "zero_optimization.stage": STAGE,
    "sequence_parallel_size": POSITIVE,
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
    problem = next(_problems(values), None)
    if problem is not None:
        raise ConfigError(f"DeepSpeed config {path}: {problem}")


def _problems(values: dict[str, Any]) -> Iterator[str]:
    """What is wrong, as clauses; those behind the first take its remedy for granted."""
    for name, kind in KINDS.items():
        *sections, key = name.split(".")
        holder: Any = values
        for section in sections:
            holder = holder.get(section, {})
        if key in holder and not kind.holds(holder[key]):
            yield f"{name} must be {kind.words}, not {shown(holder[key])}"
    if "bf16" in values and "bfloat16" in values:
        yield "bfloat16 is another name of bf16; give one of the two"
    enabled = [name for name in ("bf16", "bfloat16", "fp16") if values.get(name, {}).get("enabled")]
    if len(enabled) > 1:
        yield f"{enabled[0]} and {enabled[1]} are both enabled; enable one"
    for section, known in (("optimizer", ("type", "params", "legacy_fusion")), ("scheduler", ("type", "params"))):
        for key in values.get(section, {}):
            if key not in known:
                yield f"{section}.{shown(key)[1:-1]} is not read; what {section} takes stands in {section}.params"
    yield from _of_scheduler(values)
    yield from _of_optimizer(values.get("optimizer", {}))
    yield from _of_zero(values)


def _of_scheduler(values: dict[str, Any]) -> Iterator[str]:
    if "scheduler" not in values:
        return
    name, stage = values["scheduler"].get("type"), values.get("zero_optimization", {}).get("stage", 0)
    if name is None:
        yield "scheduler has no type, and would do nothing; name one or remove it"
    if stage and name not in SCHEDULERS:  # PyTorch's take no optimizer of ZeRO
        yield (
            f"scheduler.type {shown(name)[1:-1]} is none of those that DeepSpeed has for ZeRO {stage}; "
            f"{nearest_key(name, list(SCHEDULERS))}"
        )


def _of_optimizer(optimizer: dict[str, Any]) -> Iterator[str]:
    name, params = optimizer.get("type", "AdamW"), optimizer.get("params", {})
    if name.lower() in IMPOSSIBLE:
        remedy = f"take one of {', '.join(OPTIMIZERS.values())}"
        yield f"optimizer {shown(name)[1:-1]} {IMPOSSIBLE[name.lower()]}; {remedy}"
    known = PARAMS.get(name.lower(), ())
    if name.lower() in ADAMS:
        # Must agree with choose_adam (gpu.py), which chooses later.
        known = _TORCH_ADAM if params.get("torch_adam", not OWN_ADAM_ALONE & params.keys()) else _OWN_ADAM
    for key in params if known else ():
        if key not in known:
            with_adam = "" if known is not _OWN_ADAM or key not in _TORCH_ADAM else ' without "torch_adam": true'
            yield (
                f"optimizer.params.{shown(key)[1:-1]} is no option of {shown(name)[1:-1]}{with_adam}; "
                f"{IN_PARAMS.get(key) or nearest_key(key, list(known))}"
            )
    if params.get("fused") and params.get("foreach"):
        yield "optimizer.params has both fused and foreach; give one of the two"
    if params.get("differentiable"):
        yield (
            "optimizer.params.differentiable is for gradients through steps, which no training here takes; leave it out"
        )


def _of_zero(values: dict[str, Any]) -> Iterator[str]:
    dtype = values.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if dtype not in ("fp32", "bf16", "fp16"):  # DeepSpeed takes int8, in which gradients are zero
        yield f"data_types.grad_accum_dtype must be fp32, bf16 or fp16, not {shown(dtype)}"
    zero = values.get("zero_optimization", {})
    if zero.get("elastic_checkpoint"):
        yield (
            "zero_optimization.elastic_checkpoint is not supported here; remove it: checkpoints go on with any number "
            "of ranks without it"
        )
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) or {}
        if offload.get("device") == "nvme" and not offload.get("nvme_path"):
            yield (
                f"zero_optimization.{name}.device is nvme, and nothing says where; set nvme_path beside it to a folder "
                "of a local disk"
            )

"""Reads the DeepSpeed JSON, fills its "auto" values from the run configuration and refuses contradictions.

DeepSpeed accepts an unknown top-level key silently and reports most contradictions by an assertion deep inside;
here each is one sentence before anything heavy is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vqmoe_ds.config.deepspeed_values import ADAMS, OPTIMIZERS, WITHOUT_BETAS, check_values
from vqmoe_ds.config.gpu import check_optimizer_runs, check_widths, choose_adam, set_precision, use_bf16
from vqmoe_ds.config.load import LoadedConfig
from vqmoe_ds.config.meanings import IN_DEEPSPEED_JSON, nearest_key
from vqmoe_ds.config.problems import first_problem
from vqmoe_ds.config.reading import read_json
from vqmoe_ds.config.schema import RunConfig, SequencePlacement
from vqmoe_ds.runtime.device import uses_gpu
from vqmoe_ds.runtime.errors import ConfigError, shown

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = (PACKAGE if (PACKAGE / "ds_configs").is_dir() else PACKAGE.parent) / "ds_configs"
"""The shipped JSON files: a wheel has them in the package (setup.py), a checkout beside it."""
TOP_LEVEL_KEYS = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "fp16",
    "bf16",
    "bfloat16",
    "data_types",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "disable_allgather",
    "disable_python_gc",
    "sparse_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
    "comms_logger",
    "flops_profiler",
    "activation_checkpointing",
    "checkpoint",
    "aio",
    "autotuning",
    "compile",
    "timers",
    "expert_parallel",
    "sequence_parallel_size",
    "use_data_before_expert_parallelism",
    "dataloader_drop_last",
    "weight_quantization",
]
"""Top-level keys DeepSpeed 0.19.8 reads and this trainer can run with."""

UNSUPPORTED = {
    "hybrid_engine": "(inference engine) is not supported here; remove it",
    "pipeline": "(pipeline parallelism) is not supported here; remove it",
    "tensor_parallel": "(tensor parallelism) is not supported here; remove it",
    "data_efficiency": "(DeepSpeed's data sampler) is not supported here; remove it",
    "torch_autocast": "is not supported here (distances to codes would be computed in bf16); write "
    '"bf16": {"enabled": true} instead',
}
"""Keys that DeepSpeed knows and we refuse, and the rest of the sentence."""


@dataclass(frozen=True)
class EngineConfig:
    """The DeepSpeed JSON and the run configuration, joined.

    ``deepspeed`` is the dictionary for ``deepspeed.initialize``: no "auto" left, no ``expert_parallel`` section (our
    layer brings its own groups). ``run`` is the run configuration with the JSON's numbers in it.
    """

    deepspeed: dict[str, Any]
    run: RunConfig
    ep_size: int
    world_size: int
    micro_batch: int
    accumulation_steps: int

    @property
    def sp_size(self) -> int:
        """Consecutive ranks that share every sequence."""
        return self.run.train.sequence_parallel_size

    @property
    def readers(self) -> int:
        """Groups of ranks that read different sequences."""
        return self.world_size // self.sp_size

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch that a rank computes."""
        return self.micro_batch * self.run.model.sequence_length // self.sp_size

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> str:
        for name in ("bf16", "fp16"):
            if self.deepspeed.get(name, {}).get("enabled"):
                return name
        return "fp32"

    def ep_rank(self, rank: int) -> int:
        """A rank's place in its expert-parallel group (DeepSpeed's E+D or D+E order)."""
        # By this number experts are dealt out. It must be that of deepspeed.utils.groups, and of ep_place, by which
        # checkpoints are read (checkpoint/formats/deepspeed/reader.py).
        if self.deepspeed.get("use_data_before_expert_parallelism"):
            return rank // (self.world_size // self.ep_size)
        return rank % self.ep_size

    @property
    def sharing(self) -> str:
        """The sequence-parallel size for a line of the layout; nothing where no sequence is shared."""
        return f"SP {self.sp_size}, " if self.sp_size > 1 else ""

    def layout(self) -> dict[str, Any]:
        """The choices that a checkpoint's files depend on."""
        return {
            "world_size": self.world_size,
            "ep_size": self.ep_size,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
        }


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The JSON as a dictionary; unknown or unsupported top-level keys and values of another kind are refused.

    ``ds_configs/NAME`` is a shipped file wherever there is no other of that name.
    """
    folder, name = os.path.split(path)
    shipped = SHIPPED / name
    here = folder != "ds_configs" or os.path.exists(path) or not os.path.isfile(shipped)
    values = read_json(path if here else str(shipped), "DeepSpeed config")
    if not isinstance(values, dict):
        raise ConfigError(f"DeepSpeed config {path} must be a JSON object, not {shown(values)}")
    for key in values:
        if key in UNSUPPORTED:
            raise ConfigError(f"DeepSpeed config {path}: {key} {UNSUPPORTED[key]}")
        if key not in TOP_LEVEL_KEYS:
            hint = IN_DEEPSPEED_JSON.get(key) or nearest_key(key, TOP_LEVEL_KEYS)
            raise ConfigError(f"DeepSpeed config {path}: top-level key {shown(key)} is unknown; {hint}")
    check_values(path, values)
    if values.get("checkpoint", {}).get("writer"):
        raise ConfigError(
            f"DeepSpeed config {path}: checkpoint.writer (DeepSpeed's own checkpoint writers) is not supported here; "
            "remove it: checkpoints are sealed while training goes on"
        )
    return values


def resolve(
    path: str, loaded: LoadedConfig, world_size: int, ep_size: int | None = None, gpu: bool | None = None
) -> EngineConfig:
    """Join the JSON at ``path`` with the run configuration for ``world_size`` ranks.

    Torch's Adam is fused; on GPUs bf16 is what counts where the JSON says nothing of precision.

    Args:
        path: DeepSpeed JSON.
        loaded: run configuration and the fields the user set; these may not contradict a number in the JSON.
        world_size: ranks of the run.
        ep_size: expert-parallel size from the command line, if given.
        gpu: whether the run goes to GPUs; None: as this process would.

    Raises:
        ConfigError: contradiction, a size that divides nothing, or on GPUs a width that their products do not take.
    """
    values = read_deepspeed_json(path)
    joiner = Joiner(path, loaded)
    params = _join_optimizer(joiner, values)
    joiner.join(values, "gradient_clipping", "train.grad_clip")
    # Before the batch sizes: ranks that share sequences read one micro-batch together.
    sp_size = _sequence_parallel_size(values, joiner, world_size)
    micro, accumulation = _batch_sizes(values, joiner, world_size // sp_size, path)
    run = joiner.config()
    # The others' constructors refuse an argument that they do not have.
    if kind_of_optimizer(values) not in WITHOUT_BETAS:
        params["betas"] = [run.train.beta1, run.train.beta2]
    size = _expert_parallel_size(values, path, ep_size)
    values.setdefault("steps_per_print", 10**9)
    values.update(train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation)
    if "scheduler" in values:
        values["scheduler"].setdefault("params", {})  # DeepSpeed unpacks them
    # DeepSpeed takes either name; whoever asks for the precision looks at one.
    if "bfloat16" in values:
        values["bf16"] = values.pop("bfloat16")
    for name, value in leaves(values):
        if value == "auto":
            raise ConfigError(f'DeepSpeed config {path}: {name}="auto" has no counterpart here; write the value')
    _check_expert_parallel(size, world_size, run)
    check_sequence_parallel(run, world_size)
    if trouble := placement_trouble(run, size, bool(values.get("use_data_before_expert_parallelism"))):
        raise ConfigError(trouble)
    gpu = uses_gpu() if gpu is None else gpu  # asked last: it imports torch, and bad input has been answered
    # Before use_bf16, which leaves a JSON alone that says something of precision.
    set_precision(values, run.train.precision, path)
    if gpu:
        use_bf16(values)
    check_optimizer_runs(values, gpu, path)  # which asks for the precision
    choose_adam(values)
    config = EngineConfig(values, run, size, world_size, micro, accumulation)
    if gpu:
        check_widths(run, config.precision, size)
    return config


class Joiner:
    """Takes numbers over from the JSON at ``path`` into the run configuration, or from there into "auto"."""

    def __init__(self, path: str, loaded: LoadedConfig) -> None:
        self.path, self.loaded = path, loaded
        self.values = loaded.config.model_dump()

    def join(self, holder: dict[str, Any], key: str, field: str, part: int | None = None) -> None:
        section, name = field.split(".")
        given = holder.get(key, "auto")
        if given == "auto":
            holder[key] = self.values[section][name]
            return
        number = given[part] if part is not None else given
        if field in self.loaded.explicit and number != self.values[section][name]:
            raise ConfigError(
                f"{field}={self.values[section][name]} contradicts {key}={shown(given)} in DeepSpeed config "
                f'{self.path}; write "auto" there or drop {field}'
            )
        self.values[section][name] = number

    def config(self) -> RunConfig:
        try:
            return RunConfig.model_validate(self.values)
        except ValidationError as error:
            raise ConfigError(f"DeepSpeed config {self.path}: {first_problem(error)}") from None


def _join_optimizer(joiner: Joiner, values: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's ``params``, joined but for betas that are "auto"."""
    optimizer = values.setdefault("optimizer", {"type": "AdamW", "params": {}})
    optimizer.setdefault("type", "AdamW")  # else DeepSpeed makes none
    if optimizer["type"].lower() in OPTIMIZERS:
        optimizer["type"] = OPTIMIZERS[optimizer["type"].lower()]
        if optimizer["type"].lower() not in ADAMS:
            values.setdefault("zero_allow_untested_optimizer", True)  # it is tested here
        if optimizer["type"] == "Adagrad" and values.get("zero_optimization", {}).get("stage"):
            raise ConfigError(
                f"DeepSpeed config {joiner.path}: DeepSpeed makes one group of all parameters for Adagrad at ZeRO 1 to "
                '3, and experts need their own; set "zero_optimization": {"stage": 0} or take another optimizer'
            )
        if optimizer["type"] == "Muon" and values.get("zero_optimization", {}).get("stage") == 3:
            values["zero_optimization"].setdefault("reduce_scatter", False)  # DeepSpeed refuses the two together
    params: dict[str, Any] = optimizer.setdefault("params", {})
    if params.get("betas", "auto") != "auto":
        joiner.join(params, "betas", "train.beta1", part=0)
        joiner.join(params, "betas", "train.beta2", part=1)
    joiner.join(params, "lr", "train.learning_rate")
    joiner.join(params, "weight_decay", "train.weight_decay")
    return params


def kind_of_optimizer(values: dict[str, Any]) -> str:
    """``optimizer.type`` of a DeepSpeed JSON, in small letters."""
    return str(values["optimizer"]["type"]).lower()


def _sequence_parallel_size(values: dict[str, Any], joiner: Joiner, world: int) -> int:
    """Ranks that share every sequence; the JSON names them, as DeepSpeed's batch arithmetic asks, where there are any.

    Raises:
        ConfigError: a contradiction, or a number that does not divide the ranks.
    """
    name = "sequence_parallel_size"
    if name in values or joiner.values["train"][name] > 1:
        joiner.join(values, name, f"train.{name}")
    size = int(joiner.values["train"][name])
    _check_ranks(size, world)
    return size


def _check_ranks(size: int, world: int) -> None:
    if world % size:
        raise ConfigError(f"sequence-parallel size {size} does not divide the {world} ranks of this run")


def _batch_sizes(values: dict[str, Any], joiner: Joiner, readers: int, path: str) -> tuple[int, int]:
    """(micro-batch, accumulation steps) so that micro * accumulation * readers = train_batch_size."""
    total, micro, accumulation = join_batch_size(values, joiner, readers)
    if micro is None and accumulation is None:
        accumulation = 1
    if micro is None:
        micro = total // (readers * (accumulation or 1))
    if accumulation is None:
        accumulation = total // (readers * micro) if micro else 0
    if micro < 1 or accumulation < 1 or micro * accumulation * readers != total:
        ranks = in_words(readers, joiner.values["train"]["sequence_parallel_size"])
        raise ConfigError(
            f"batch sizes contradict: train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {accumulation} x {ranks} (DeepSpeed config {path}, train.batch_size)"
        )
    return micro, accumulation


def join_batch_size(values: dict[str, Any], joiner: Joiner, readers: int) -> tuple[int, int | None, int | None]:
    """Join ``train_batch_size`` and ``train.batch_size``.

    Args:
        readers: ranks, or groups of ranks that share sequences.

    Returns:
        It, and the micro-batch and accumulation steps that the JSON has, None where it leaves them open.

    Raises:
        ConfigError: a contradiction.
    """
    total, micro, accumulation = (
        None if values.get(key, "auto") == "auto" else values[key]
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    # The two fix the total: it replaces a preset's train.batch_size, and contradicts one that the user set.
    if total is None and micro is not None and accumulation is not None:
        values["train_batch_size"] = micro * accumulation * readers
    joiner.join(values, "train_batch_size", "train.batch_size")
    return int(values["train_batch_size"]), micro, accumulation


def in_words(readers: int, sharing: int) -> str:
    """Ranks, or groups of ranks that share sequences, for a sentence on batch sizes."""
    return f"{readers} ranks" if sharing == 1 else f"{readers} groups of {sharing} ranks that share sequences"


def _expert_parallel_size(values: dict[str, Any], path: str, from_command_line: int | None) -> int:
    section = values.pop("expert_parallel", {})
    for key in section:
        if key not in ("enabled", "autoep_size"):
            raise ConfigError(
                f"DeepSpeed config {path}: expert_parallel.{key} is not read here; only autoep_size (and enabled) are"
            )
    in_json = section.get("autoep_size") if section.get("enabled", True) else None
    if from_command_line is not None and in_json is not None and from_command_line != in_json:
        raise ConfigError(
            f"--ep_size {shown(from_command_line)} contradicts expert_parallel.autoep_size={in_json} in DeepSpeed "
            f"config {path}; give it once"
        )
    size = from_command_line if from_command_line is not None else in_json
    return 1 if size is None else int(size)


def _check_expert_parallel(size: int, world: int, run: RunConfig) -> None:
    if size < 1 or world % size:
        raise ConfigError(f"expert-parallel size {shown(size)} does not divide the {world} ranks of this run")
    if run.moe.facts.has_experts and run.moe.num_experts % size:
        raise ConfigError(f"expert-parallel size {size} does not divide moe.num_experts={run.moe.num_experts}")


def check_sequence_parallel(run: RunConfig, world: int) -> None:
    """Refuse what ranks that share sequences cannot compute.

    Raises:
        ConfigError: ranks, heads or positions do not divide, or experts depend on tokens of other ranks.
    """
    size = run.train.sequence_parallel_size
    _check_ranks(size, world)
    if size == 1:
        return
    if run.model.image_size:
        raise ConfigError(f"sequence-parallel size {size} shares texts; leave --sp_size out to train on images")
    for name in ("heads", "kv_heads", "sequence_length"):
        number = getattr(run.model, name)
        if number % size:
            raise ConfigError(f"sequence-parallel size {size} does not divide model.{name}={number}")
    facts, remedy = run.moe.facts, "leave --sp_size (train.sequence_parallel_size) out"
    if facts.needs_whole_sequences(run.router):
        ahead = facts.looks_ahead(run.router)
        reason = f"moe.router={run.moe.router} looks at other tokens" if ahead is None else ahead.reason
        raise ConfigError(
            f"sequence-parallel size {size} gives a rank a part of every sequence, but {reason}; {remedy}, or use "
            "another router"
        )


def placement_trouble(run: RunConfig, ep_size: int, strided: bool = False) -> str | None:
    """Why tokens cannot be computed on the rank of their experts where ``train.sp_placement`` asks for it.

    Args:
        strided: whether the ranks that share experts are not consecutive.
    """
    if run.train.sp_placement is not SequencePlacement.EXPERT:
        return None
    size, groups = run.train.sequence_parallel_size, run.codebook.groups
    if size == 1 or ep_size == 1:
        found = f"needs ranks that share sequences and experts, and there are --sp_size {size} and --ep_size {ep_size}"
    elif size % ep_size:
        found = f"needs all {ep_size} ranks that share experts among the {size} that share sequences"
    elif strided:
        found = "needs consecutive ranks to share experts: leave use_data_before_expert_parallelism out"
    elif not run.moe.facts.has_discrete_path:
        found = "takes every token to the experts that codes name: set moe.router=vq"
    elif run.finetune.classes:
        found = "needs texts of one length, and those to classify have any: leave it out"
    elif groups % ep_size:
        found = f"needs all experts of a token on one rank: set codebook.groups to a multiple of --ep_size {ep_size}"
    else:
        return None
    return f"train.sp_placement=expert {found}"


def leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values of nested dictionaries."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows

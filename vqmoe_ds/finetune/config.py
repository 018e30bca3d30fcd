"""The configuration of a fine-tuning: the model of the checkpoint, defaults of its own, and what the user set."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from typing import Any

import torch

from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
from vqmoe_ds.checkpoint.load_experts import check_place
from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.checkpoint.views.discrete import discrete_config
from vqmoe_ds.checkpoint.whereabouts import whole_task, with_whole_paths
from vqmoe_ds.config.cli import overrides_from_args
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import LoadedConfig, load_config
from vqmoe_ds.config.schema import CodeSource, ModelConfig, RunConfig, Trainable
from vqmoe_ds.finetune.cli import LANGUAGE_MODEL
from vqmoe_ds.finetune.defaults import DEFAULTS, FEWEST_STEPS, LANGUAGE_MODEL_STEPS, OFTEN, SELDOM
from vqmoe_ds.runtime.device import uses_gpu
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.memory import parse_memory
from vqmoe_ds.runtime.ranks import Place

OPTIONS = {
    "text_column": "finetune.text_key",
    "label_column": "finetune.label_key",
    "expert_memory": "finetune.expert_memory",
}
"""Options and the fields that they set."""

SIZES = (
    *(f"model.{name}" for name in ModelConfig.model_fields if name != "sequence_length"),
    "moe.num_experts",
    "moe.expert_hidden",
    "moe.shared_experts",
    "moe.shared_gate",
    "codebook.num_codes",
    "codebook.code_dim",
    "codebook.groups",
    "codebook.source",
    "codebook.distance",
    "codebook.context_window",
    "codebook.source_block",
    "codebook.normalize_source",
)
"""Fields that make weights and codebook mean what they do; a fine-tuning cannot set them."""


def starting_config(args: argparse.Namespace, reader: CheckpointReader) -> LoadedConfig:
    """The configuration of the run before its data are known.

    model, moe, router and codebook are those of the checkpoint, of a vq model on its discrete path unless
    ``finetune.discrete`` says no; data, through which its tokenizer is found, too, unless there are other data.
    ``--config`` and ``--set`` come over them and over ``DEFAULTS``.

    Raises:
        ConfigError: unknown or contradicting options.
    """
    overrides = overrides_from_args(args)
    whole = {"finetune.checkpoint": os.path.abspath(args.checkpoint), "finetune.task": whole_task(args.task)}
    overrides.update(whole)  # they are read again from wherever the run goes on
    for option, name in OPTIONS.items():
        value = getattr(args, option)
        if value is not None and overrides.get(name, value) != value:
            raise ConfigError(f"--{option} {value} contradicts --set {name}={overrides[name]}; leave one of them out")
        overrides |= {} if value is None else {name: value}
    source = run_config(reader.config, reader.path)
    kept = ("model", "moe", "router", "codebook") + (() if args.task == LANGUAGE_MODEL else ("data",))
    # Loaded twice: whether the discrete path is taken is an option, too, and its sections come below the user's own.
    base = {**source.model_dump(mode="json", include=set(kept)), **DEFAULTS}
    loaded = load_config(file=args.config, overrides=overrides, base=base)
    if loaded.config.moe.facts.has_discrete_path and loaded.config.finetune.discrete:
        base = {**base, **_discrete_sections(base, loaded)}
    base["router"] = _schedules_of(source)
    loaded = load_config(file=args.config, overrides=overrides, base=base)
    check_sizes(loaded, source, args.checkpoint)
    if loaded.config.finetune.lora_rank:
        # Refused now, not when the model is built on all ranks.
        library("peft", "finetune.lora_rank")
    return loaded


def check_sizes(loaded: LoadedConfig, source: RunConfig, path: str) -> None:
    """Refuse sizes other than those of the pretrained model.

    Raises:
        ConfigError: the user set another one.
    """
    ours, theirs = loaded.config.model_dump(mode="json"), source.model_dump(mode="json")
    for field in SIZES:
        section, name = field.split(".")
        if field in loaded.explicit and ours[section][name] != theirs[section][name]:
            raise ConfigError(
                f"{field}={ours[section][name]} is not that of {path}, {theirs[section][name]}: fine-tuning keeps the "
                f"model as it was pretrained; leave {field} out, or pretrain a model that has it"
            )


def _discrete_sections(base: dict[str, Any], loaded: LoadedConfig) -> dict[str, Any]:
    """moe, model and codebook of the discrete path; no token may change its code for a step of training.

    Codes that look at embeddings look at a copy of them that stays, if the embeddings learn or had such a copy.
    """
    discrete = discrete_config({name: base[name] for name in ("model", "moe", "router", "codebook")})
    book, finetune = discrete["codebook"], loaded.config.finetune
    # The head of a language model learns in every case (models.build.learns), and a tied one moves the embeddings.
    tied = loaded.config.model.tie_embeddings and finetune.task == LANGUAGE_MODEL
    learning = tied or finetune.trainable is Trainable.ALL
    of_states = book["source"] in (CodeSource.LAYER_STATE.value, CodeSource.EARLY_BLOCK.value)
    frozen = "codebook.learning" not in loaded.explicit or loaded.config.codebook.learning == "frozen"
    if frozen and not of_states and (learning or book["source_momentum"]):
        # A moving average that keeps all of its past: the table that codes look at never moves.
        book["source_momentum"] = 1.0
    return discrete


def _schedules_of(source: RunConfig) -> dict[str, Any]:
    """Options of routers whose schedules go by the steps of a run: those of the pretraining stay."""
    options = source.moe.facts.with_schedules(source.router, source.train.steps)
    return dict(options.model_dump(mode="json"))


def classifier_config(loaded: LoadedConfig, classes: tuple[str, ...], rows: int) -> LoadedConfig:
    """The configuration of a classifier trained on ``rows`` texts: steps, batch and intervals that the user left open.

    Raises:
        ConfigError: fewer texts than a batch takes.
    """
    run, explicit = loaded.config, loaded.explicit
    train, output = run.train, run.run
    if rows < train.batch_size and (run.finetune.shots == 0 or "train.batch_size" in explicit):
        raise ConfigError(
            f"train.batch_size={train.batch_size} is more than the {rows} training texts; lower it, or give more texts"
        )
    if rows < train.batch_size:
        train = train.model_copy(update={"batch_size": 1 << (rows.bit_length() - 1)})
    an_epoch = math.ceil(rows / train.batch_size)
    if "train.steps" not in explicit:
        fewest = 1 if "finetune.epochs" in explicit else FEWEST_STEPS
        steps = max(fewest, math.ceil(run.finetune.epochs * rows / train.batch_size))
        train = train.model_copy(update={"steps": steps})
    output = _intervals(loaded, max(OFTEN, min(SELDOM, an_epoch)))
    finetune = run.finetune.model_copy(update={"classes": classes})
    config = run.model_copy(update={"train": train, "run": output, "finetune": finetune})
    return replace(loaded, config=with_whole_paths(config))


def language_model_config(loaded: LoadedConfig, tokenizer_sha256: str | None) -> LoadedConfig:
    """The configuration of a language model: the data's tokenizer, and what the user left open."""
    run, train = loaded.config, loaded.config.train
    if "train.steps" not in loaded.explicit:
        train = train.model_copy(update={"steps": LANGUAGE_MODEL_STEPS})
    every = max(1, min(SELDOM, train.steps // OFTEN))
    sections = {
        "train": train,
        "run": _intervals(loaded, every),
        "data": run.data.model_copy(update={"tokenizer_sha256": tokenizer_sha256}),
        "finetune": run.finetune.model_copy(update={"classes": ()}),  # --config may be of a classifier
    }
    config = run.model_copy(update=sections)
    return replace(loaded, config=with_whole_paths(config))


def _intervals(loaded: LoadedConfig, every: int) -> Any:
    output = loaded.config.run
    evals = output.eval_every if "run.eval_every" in loaded.explicit else every
    saves = output.save_every if "run.save_every" in loaded.explicit else evals
    return output.model_copy(update={"eval_every": evals, "save_every": saves})


def for_run(loaded: LoadedConfig, seed: int, shots: int) -> LoadedConfig:
    """The configuration of one of several runs."""
    run = loaded.config
    sections = {
        "train": run.train.model_copy(update={"seed": seed}),
        "finetune": run.finetune.model_copy(update={"shots": shots}),
    }
    return replace(loaded, config=run.model_copy(update=sections))


def with_numbers_of_json(loaded: LoadedConfig, args: argparse.Namespace, place: Place) -> LoadedConfig:
    """Apply the JSON's batch size before the data are read, so that what cannot run is refused now."""
    config = resolve(args.ds_config, loaded, place.world_size, args.ep_size)
    check_can_run(config)
    return replace(loaded, config=config.run)


def check_can_run(config: EngineConfig) -> None:
    """Refuse a layout at which DeepSpeed would fail hours later.

    Raises:
        ConfigError: frozen experts at ZeRO-3, which it cannot save; or a memory for experts that are not frozen, on a
            GPU, or on several ranks.
    """
    _check_expert_memory(config)
    frozen = config.run.finetune.trainable is Trainable.HEAD and config.run.moe.facts.has_experts
    if frozen and config.zero_stage == 3:
        raise ConfigError(
            "finetune.trainable=head freezes the experts, and DeepSpeed cannot save frozen experts at ZeRO-3; "
            "take a DeepSpeed config of ZeRO 0 to 2"
        )


def _check_expert_memory(config: EngineConfig) -> None:
    finetune = config.run.finetune
    if parse_memory(finetune.expert_memory, "--expert_memory") is None:
        return
    check_place(config.run, torch.device("cuda" if uses_gpu() else "cpu"), config.ep_size)
    if finetune.trainable is not Trainable.HEAD:
        raise ConfigError(
            f"--expert_memory is for frozen experts, and finetune.trainable={finetune.trainable.value} trains them; "
            "set finetune.trainable=head (perhaps with finetune.lora_rank), or leave it out"
        )


def check_batch(config: EngineConfig, wanted: int, path: str) -> None:
    """Refuse a JSON whose batch is not the one that was made smaller for few shots.

    Raises:
        ConfigError: it gives another.
    """
    # In resolve a number of the JSON wins over a batch that the user did not set.
    size = config.run.train.batch_size
    if size != wanted:
        raise ConfigError(
            f"so few texts are trained on in batches of {wanted}, and DeepSpeed config {path} gives "
            f'train_batch_size={size}; write "auto" there'
        )

"""Fine-tuning from a parsed command line: one run, or one for each seed and number of shots, with a report."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import LoadedConfig, read_yaml
from vqmoe_ds.finetune.cli import LANGUAGE_MODEL, check_options, shots_of
from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.files import make_folder
from vqmoe_ds.runtime.ranks import Place, from_first
from vqmoe_ds.train.job import Job, Start, TrainingCommand, launch, show
from vqmoe_ds.train.run_folder import first_free, has_run

if TYPE_CHECKING:
    from vqmoe_ds.checkpoint.reader import CheckpointReader
    from vqmoe_ds.data.batches import Batches, Windows
    from vqmoe_ds.models.session import Session
    from vqmoe_ds.train.callbacks import Callback, MetricsFile

SAME = {
    "finetune": (
        "checkpoint",
        "task",
        "text_key",
        "label_key",
        "classes",
        "holdout",
        "shots",
        "discrete",
        "trainable",
        "lora_rank",
        "pool",
    ),
    "train": ("seed",),
    "data": ("path",),
}
"""Fields that a run keeps for as long as its folder lives: others would mix its splits, or are of another model."""


class Task(Protocol):
    """The thing to learn: labelled texts or plain text."""

    def configure(self, loaded: LoadedConfig) -> LoadedConfig:
        """The configuration of one run with what follows from its data."""

    def describe(self, run: Any) -> list[str]:
        """Lines for the user."""

    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of all that is read, by name."""

    def open(self, job: Job) -> tuple[Batches, Windows]:
        """Training batches of one run, and texts for the routing probe; all ranks call it together."""

    def callbacks(self, job: Job, file: MetricsFile, health: Any) -> tuple[Callback, Callback]:
        """(interim validation, final report) of the run opened last."""


def main(args: argparse.Namespace) -> int:
    """Run one fine-tuning command; returns the exit code of the process."""
    return launch(FineTuning(args))


class FineTuning(TrainingCommand):
    """Trains a pretrained model further: one run, or one for each seed and number of shots."""

    reader: CheckpointReader
    task: Task
    configs: dict[str, EngineConfig]
    """Configuration of each run, by its folder within that of the command; ``""`` is that folder itself."""

    def prepare(self, place: Place, console: Console) -> Start | None:
        args = self.args
        check_options(args)
        shots = shots_of(args)
        console.capture(Path(os.devnull))  # what comes now imports torch and DeepSpeed, which have much to say
        from vqmoe_ds.checkpoint.open import open_checkpoint
        from vqmoe_ds.checkpoint.reader import require_language_model
        from vqmoe_ds.checkpoint.views.adapters import merged
        from vqmoe_ds.finetune.config import starting_config

        self.reader = merged(open_checkpoint(args.checkpoint))
        require_language_model(self.reader, "fine-tuning")
        loaded = starting_config(args, self.reader)
        loaded = _with_numbers_of_json(loaded, args, place)
        run_dir = _choose_run_dir(loaded, args.resume)
        check_kind(run_dir, several=bool(shots or args.seeds))
        self.task = _open_task(args, self.reader, loaded)
        self.configs = self._configure(loaded, shots, place)
        first = next(iter(self.configs.values()))
        if args.print_config:
            show(first, place, console)
            return None
        for name, config in self.configs.items():
            _check_finished(run_dir / name, config)
        return Start(first, run_dir, [*loaded.notes, *_greeting(first, self.task, self.reader, run_dir)])

    def _configure(self, loaded: LoadedConfig, shots: list[int], place: Place) -> dict[str, EngineConfig]:
        from vqmoe_ds.finetune.config import for_run

        args, configs = self.args, {}
        seeds = range(1, args.seeds + 1) if args.seeds else [loaded.config.train.seed]
        for number in shots or [loaded.config.finetune.shots]:
            for seed in seeds:
                parts = [f"shots-{number}"] * bool(shots) + [f"seed-{seed}"] * bool(shots or args.seeds)
                one = self.task.configure(for_run(loaded, seed, number))
                config = configs["/".join(parts)] = resolve(args.ds_config, one, place.world_size, args.ep_size)
                check_batch(config, one.config.train.batch_size, args.ds_config)
        return configs

    def run(self, job: Job) -> int:
        from vqmoe_ds.finetune.report import write_report

        several = len(self.configs) > 1 or "" not in self.configs
        for name, config in self.configs.items():
            one = replace(job, config=config, run_dir=job.run_dir / name)
            if _summary(one.run_dir) is not None:
                job.console.say(f"{one.run_dir} is finished already")
                continue
            if several:
                job.console.say(f"--- {name}")
            make_folder(one.run_dir)
            code = self._run_one(one)
            if code:
                return code
            job = replace(job, started=time.time())
        if several and job.place.rank == 0:
            for line in write_report(job.run_dir, list(self.configs)):
                job.console.say(line)
        return 0

    def _run_one(self, job: Job) -> int:
        from vqmoe_ds.checkpoint.io.store import read_manifest
        from vqmoe_ds.evaluation.routing import RoutingHealth
        from vqmoe_ds.finetune.callbacks import EarlyStop
        from vqmoe_ds.train import callbacks as cb
        from vqmoe_ds.train.opening import find_tag, open_session

        task, reader = self.task, self.reader
        fingerprint = from_first(_fingerprint(job, task, reader) if job.place.rank == 0 else {})
        tag, job = find_tag(job, fingerprint)
        if tag is not None:
            check_same(tag, read_manifest(tag)["config"], job.config)
        batches, probe = task.open(job)
        opened = open_session(job, tag, fingerprint, partial(begin, reader=reader))
        file = opened.metrics_file()
        health = RoutingHealth(opened.session, probe, job.config.run.run.probe_tokens)
        validation, report = task.callbacks(job, file, health)
        callbacks = [
            cb.Metrics(job.console, file, health),
            validation,
            EarlyStop(job.console, file, job.config.run.finetune.patience),
            cb.Checkpoints(job.console, job.checkpoints),
            cb.Signals(),
            report,
        ]
        code = opened.train(batches, callbacks, file)
        opened.session.engine.destroy()
        return code


def _with_numbers_of_json(loaded: LoadedConfig, args: argparse.Namespace, place: Place) -> LoadedConfig:
    """Apply the JSON's batch size before the data are read, so that what cannot run is refused now."""
    config = resolve(args.ds_config, loaded, place.world_size, args.ep_size)
    check_can_run(config)
    return replace(loaded, config=config.run)


def check_batch(config: EngineConfig, wanted: int, path: str) -> None:
    """Refuse a JSON whose batch is not the one that was made smaller for few shots.

    Raises:
        ConfigError: it gives another.
    """
    size = config.run.train.batch_size
    if size != wanted:
        raise ConfigError(
            f"so few texts are trained on in batches of {wanted}, and DeepSpeed config {path} gives "
            f'train_batch_size={size}; write "auto" there'
        )


def _open_task(args: argparse.Namespace, reader: CheckpointReader, loaded: LoadedConfig) -> Task:
    from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
    from vqmoe_ds.checkpoint.load_model import require_tokenizer

    run, source = loaded.config, run_config(reader.config, reader.path)
    if args.task == LANGUAGE_MODEL:
        from vqmoe_ds.finetune.language import open_text

        return open_text(loaded, source, reader)
    from vqmoe_ds.finetune.classification import ClassificationTask, open_texts

    tokenizer = require_tokenizer(reader, source, args.tokenizer)
    return ClassificationTask(open_texts(run.finetune, tokenizer, run.model.sequence_length))


def _choose_run_dir(loaded: LoadedConfig, resume: str) -> Path:
    """The run folder as given; for the default name the first of ``NAME``, ``NAME-2`` … without a finished run."""
    wanted, afresh = Path(loaded.config.run.run_dir), resume == "never"
    if "run.run_dir" not in loaded.explicit:
        return first_free(wanted, lambda f: (f / "summary.json").exists() or (afresh and _used(f)))
    if afresh and _used(wanted):
        raise ConfigError(f"run folder {wanted} already holds a run; choose another --run_dir, or --resume auto")
    return wanted


def _used(folder: Path) -> bool:
    return has_run(folder) or _has_several(folder)


def _has_several(folder: Path) -> bool:
    return any(folder.glob("seed-*")) or any(folder.glob("shots-*"))


def check_kind(folder: Path, several: bool) -> None:
    """Refuse a single run in the folder of several, or several in that of a single one.

    Raises:
        ConfigError: ``folder`` is of the other kind.
    """
    if has_run(folder) if several else _has_several(folder):
        there = "a single run" if several else "several runs (--seeds or --shots)"
        raise ConfigError(f"{folder} holds {there}, which this command is not; choose another --run_dir")


def check_can_run(config: EngineConfig) -> None:
    """Refuse a layout at which DeepSpeed would fail hours later.

    Raises:
        ConfigError: frozen experts at ZeRO-3, which it cannot save.
    """
    from vqmoe_ds.config.schema import Trainable

    frozen = config.run.finetune.trainable is Trainable.HEAD and config.run.moe.facts.has_experts
    if frozen and config.zero_stage == 3:
        raise ConfigError(
            "finetune.trainable=head freezes the experts, and DeepSpeed cannot save frozen experts at ZeRO-3; "
            "take a DeepSpeed config of ZeRO 0 to 2"
        )


def _summary(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def _check_finished(folder: Path, config: EngineConfig) -> None:
    """Refuse a folder that holds a finished run of another fine-tuning.

    Raises:
        ConfigError: it does.
    """
    if _summary(folder) is not None:
        check_same(folder, read_yaml(str(folder / "config.yaml"), "configuration of a finished run"), config)


def check_same(folder: Path, saved: dict[str, Any], config: EngineConfig) -> None:
    run = config.run.model_dump(mode="json")
    for section, names in SAME.items():
        for name in names:
            theirs, ours = saved.get(section, {}).get(name), run[section][name]
            if theirs != ours:
                raise ConfigError(
                    f"{folder} holds another fine-tuning: {section}.{name}={theirs} there, {ours} here; "
                    "choose another --run_dir"
                )


def _greeting(config: EngineConfig, task: Task, reader: CheckpointReader, run_dir: Path) -> list[str]:
    run, moe = config.run, config.run.moe
    route = f"{moe.router}, {moe.num_experts} experts" + (", discrete path alone" if _discrete(run) else "")
    lora = f" and LoRA of rank {run.finetune.lora_rank}" if run.finetune.lora_rank else ""
    return [
        f"VQMoE fine-tuning of {reader.path} (step {reader.step}): {route}; {config.world_size} rank(s), "
        f"EP {config.ep_size}, {config.sharing}ZeRO-{config.zero_stage}, {config.precision}",
        *task.describe(run),
        f"learning: {run.finetune.trainable.value}{lora}; run folder: {run_dir}",
    ]


def _discrete(run: Any) -> bool:

    return run.moe.facts.uses_codebook and run.finetune.discrete


def _fingerprint(job: Job, task: Task, reader: CheckpointReader) -> dict[str, str]:
    from vqmoe_ds.data.fingerprint import of_checkpoint, of_optimizer

    source = {"checkpoint that fine-tuning starts from": of_checkpoint(reader.path)}
    return {**task.fingerprint(), **source, **of_optimizer(job.config.deepspeed)}


def begin(session: Session, reader: CheckpointReader) -> None:
    """Fill a new session with the weights of the pretrained model, whatever layout either has."""
    from vqmoe_ds.checkpoint.resume.restore import restore_any_layout, whole_shapes
    from vqmoe_ds.checkpoint.resume.starting import StartingWeights
    from vqmoe_ds.checkpoint.views.discrete import DiscreteOnly

    run = session.config.run
    source = DiscreteOnly(reader) if _discrete(run) else reader
    restore_any_layout(session, StartingWeights(source, run, whole_shapes(session.model, session.config.ep_size)))

"""Fine-tuning from a parsed command line: one run, or one for each seed and number of shots, with a report."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import LoadedConfig
from vqmoe_ds.finetune.cli import check_options, shots_of
from vqmoe_ds.finetune.run_folder import check_finished, check_kind, check_same, choose_run_dir, is_finished
from vqmoe_ds.finetune.task import Task, open_task
from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.files import make_folder
from vqmoe_ds.runtime.ranks import Place, from_first
from vqmoe_ds.train.job import Job, Start, TrainingCommand, launch, show
from vqmoe_ds.train.run_folder import in_folder

if TYPE_CHECKING:
    from vqmoe_ds.checkpoint.reader import CheckpointReader
    from vqmoe_ds.models.session import Session


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
        from vqmoe_ds.finetune.config import starting_config, with_numbers_of_json

        self.reader = merged(open_checkpoint(args.checkpoint))
        require_language_model(self.reader, "fine-tuning")
        loaded = with_numbers_of_json(starting_config(args, self.reader), args, place)
        run_dir = choose_run_dir(loaded, args.resume)
        check_kind(run_dir, several=bool(shots or args.seeds))
        self.task = open_task(args, self.reader, loaded)
        self.configs = self._configure(loaded, shots, place)
        first = next(iter(self.configs.values()))
        if args.print_config:
            show(first, place, console)
            return None
        for name, config in self.configs.items():
            check_finished(run_dir / name, config)
        return Start(first, run_dir, [*loaded.notes, *_greeting(first, self.task, self.reader, run_dir)])

    def _configure(self, loaded: LoadedConfig, shots: list[int], place: Place) -> dict[str, EngineConfig]:
        from vqmoe_ds.finetune.config import check_batch, for_run

        args, configs = self.args, {}
        seeds = range(1, args.seeds + 1) if args.seeds else [loaded.config.train.seed]
        for number in shots or [loaded.config.finetune.shots]:
            for seed in seeds:
                parts = [f"shots-{number}"] * bool(shots) + [f"seed-{seed}"] * bool(shots or args.seeds)
                # For each run: steps and batch follow from the number of its texts.
                one = self.task.configure(for_run(loaded, seed, number))
                config = configs["/".join(parts)] = resolve(args.ds_config, one, place.world_size, args.ep_size)
                check_batch(config, one.config.train.batch_size, args.ds_config)
        return configs

    def run(self, job: Job) -> int:
        from vqmoe_ds.checkpoint.open import open_checkpoint
        from vqmoe_ds.checkpoint.views.adapters import merged
        from vqmoe_ds.finetune.report import write_report

        # Of a pretraining that still saves, ranks may have opened other tags.
        path = from_first(self.reader.path)
        if path != self.reader.path:
            self.reader = merged(open_checkpoint(path))
        # --seeds 1 is one run in a folder of its own, with a report.
        several = len(self.configs) > 1 or "" not in self.configs
        for name, config in self.configs.items():
            one = replace(job, config=in_folder(config, job.run_dir / name))
            # A rank that saw a summary later than others would train another run in their collectives.
            if from_first(is_finished(one.run_dir)):
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
        # All ranks enter the broadcast; only one reads the data for it.
        fingerprint = from_first(_fingerprint(job, task, reader) if job.place.rank == 0 else {})
        tag, job = find_tag(job, fingerprint)
        if tag is not None:
            check_same(tag, read_manifest(tag)["config"], job.config)
        batches, probe = task.open(job)
        opened = open_session(job, tag, fingerprint, partial(begin, reader=reader))
        file = opened.metrics_file()
        health = RoutingHealth(opened.session, probe, job.config.run.run.probe_tokens)
        validation, report = task.callbacks(job, file, health)
        # The order counts: EarlyStop and Checkpoints look at what Validation found, Signals ends a run that Checkpoints
        # has saved, and the report puts the best weights in the place of the last.
        callbacks = [
            cb.Metrics(job.console, file, health),
            validation,
            EarlyStop(job.console, file, job.config.run.finetune.patience),
            cb.Checkpoints(job.console, job.checkpoints),
            cb.Signals(),
            report,
        ]
        store = opened.session.model.expert_store
        try:
            code = opened.train(batches, callbacks, file)
            # Before the next run of the command builds its own engine: memory may not hold two.
            opened.session.engine.destroy()
        finally:
            if store is not None:
                store.close()
        if store is not None:
            job.console.say(store.summary())
        return code


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
    return run.moe.facts.has_discrete_path and run.finetune.discrete


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

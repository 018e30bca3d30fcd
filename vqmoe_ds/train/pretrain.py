"""Pretraining, on text or images, from a parsed command line: check everything, build, resume, train, report."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vqmoe_ds.checkpoint.whereabouts import with_whole_paths
from vqmoe_ds.config.cli import config_from_args
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.schema import DataConfig
from vqmoe_ds.data.at_start import check_at_start, prepared, to_prepare
from vqmoe_ds.data.image_published import are_images
from vqmoe_ds.data.images import ImageData, ImageSet, open_images
from vqmoe_ds.data.indexed import IndexedText, open_indexed_text
from vqmoe_ds.data.raw_text import RawText, open_raw_text
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.data.training_data import TrainingData
from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.errors import ConfigError, DataError
from vqmoe_ds.runtime.ranks import Place, from_first
from vqmoe_ds.train.job import Job, Start, TrainingCommand, launch, show
from vqmoe_ds.train.run_folder import first_free, has_run, index_folder

if TYPE_CHECKING:
    from vqmoe_ds.data.batches import Windows
    from vqmoe_ds.models.session import Session
    from vqmoe_ds.train.callbacks import Scored


def main(args: argparse.Namespace) -> int:
    """Run one pretraining; returns the exit code of the process."""
    return launch(Pretraining(args))


class Pretraining(TrainingCommand):
    """Trains a model from scratch on raw or prepared text, or on images."""

    data: TrainingData

    def prepare(self, place: Place, console: Console) -> Start | None:
        args = self.args
        loaded = config_from_args(args)
        config = resolve(args.ds_config, loaded, place.world_size, args.ep_size)
        if loaded.config.finetune != type(loaded.config.finetune)():
            raise ConfigError(
                "the section finetune belongs to launchers/finetune.py; leave it out, or use that launcher"
            )
        config, data = fit_to_data(config, loaded.explicit)
        if args.print_config:
            show(config, place, console)
            return None
        run_dir = choose_run_dir(config, "run.run_dir" in loaded.explicit, args.resume)
        if run_dir is None:
            console.say(f"{config.run.run.run_dir} is finished: nothing is left for this job of the chain")
            return None
        folder = index_folder(config, run_dir)
        if to_prepare(config.run):
            config = replace(config, run=prepared(config.run, folder, place, console.say))
            data = open_indexed_text(config.run)
        self.data = data or open_raw_text(config.run)
        folders = [folder] if data is not None else []
        config = replace(config, run=with_whole_paths(config.run))  # of use from wherever it is resumed or read
        greeting = [*loaded.notes, *_greeting(config, self.data, run_dir)]
        return Start(config, run_dir, greeting, folders)

    def run(self, job: Job) -> int:
        from vqmoe_ds.data.fingerprint import of_data, of_optimizer
        from vqmoe_ds.evaluation.routing import RoutingHealth
        from vqmoe_ds.train import callbacks as cb
        from vqmoe_ds.train.image_report import ImageReport
        from vqmoe_ds.train.opening import find_tag, open_session

        config, console, data = job.config, job.console, self.data
        images = isinstance(data, ImageData)
        ahead = config.run.looks_ahead
        if ahead is not None and not images:
            console.say(
                f"not causal: {ahead.reason}; its losses compare with no causal router's, and there is no text sample"
            )
        # Rank 0 reads for all: every rank then compares the same, and a resume is refused on all of them or on none.
        fingerprint = from_first({**of_data(data), **of_optimizer(config.deepspeed)} if job.place.rank == 0 else {})
        # Before data and engine are opened: a checkpoint that does not fit is refused without long work.
        tag, job = find_tag(job, fingerprint)
        config = job.config
        batches, windows = data.open(config.run, index_folder(config, job.run_dir))
        for note in data.notes if isinstance(data, ImageData) else ():
            console.say(note)
        opened = open_session(job, tag, fingerprint)
        file = opened.metrics_file()
        health = RoutingHealth(opened.session, windows, config.run.run.probe_tokens)
        report = ImageReport if images else cb.FinalReport
        # In this order: rows of metrics are on disk before the checkpoint that presupposes them, a validation is known
        # before it is asked whether its step is the best, and Signals and the report find everything saved.
        callbacks = [
            cb.Metrics(console, file, health),
            cb.Validation(console, file, partial(_score, windows)),
            cb.Checkpoints(console, job.checkpoints),
            cb.Signals(),
            report(console, file, data, windows, health, job.run_dir),
        ]
        return opened.train(batches, callbacks, file)


def _score(windows: Windows, session: Session, most: int) -> Scored:
    """Interim validation with at most a number of batches, on text or images."""
    from vqmoe_ds.evaluation.classification import classify
    from vqmoe_ds.evaluation.perplexity import validate

    if isinstance(windows, ImageSet):
        return classify(session, windows, most)
    return validate(session, windows, most * session.round_size)


def fit_to_data(config: EngineConfig, explicit: frozenset[str]) -> tuple[EngineConfig, ImageData | IndexedText | None]:
    """The configuration with what it takes from its data (vocabulary, checksum of the tokenizer, names of classes).

    Args:
        explicit: fields that the user set.

    Returns:
        The configuration, and the images or prepared text; None for text that is read as it is, or prepared, later.

    Raises:
        UserError: the data cannot be read, or are not what was asked for.
    """
    raw = to_prepare(config.run)
    check_at_start(config.run, raw)
    if raw:
        tokenizer = load_tokenizer(str(config.run.data.tokenizer))
        return fit_to_tokenizer(config, tokenizer.vocab_size, tokenizer.checksum, explicit), None
    images = open_images(config.run) if config.run.model.image_size else None
    data = images or open_indexed_text(config.run)
    named = config.run.data.tokenizer
    if data is None and named not in (None, "bytes"):
        raise ConfigError(
            f"data.tokenizer={named} is of text that --data names, and the default is read as bytes; name a source, "
            "or leave the field out"
        )
    if data is None:
        _refuse_images(config.run.data)
    known = data or RawText
    config = fit_to_tokenizer(config, known.vocab_size, known.tokenizer_sha256, explicit)
    return config if images is None else with_classes(config, images.files.classes), data


def _refuse_images(data: DataConfig) -> None:
    for path in (data.path, data.valid_path):
        if isinstance(path, str) and are_images(path):
            raise DataError(
                f"{path} holds images, and this run trains on text; choose --preset vit-cifar, or give text with --data"
            )


def fit_to_tokenizer(
    config: EngineConfig, vocab_size: int | None, checksum: str | None, explicit: frozenset[str]
) -> EngineConfig:
    """The configuration with the vocabulary and the tokenizer's checksum of the data.

    The vocabulary is not padded: ids that never occur would cost time in every product of the head. Of text a larger
    ``model.vocab_size`` may be set.

    Args:
        vocab_size: ids of the data's tokenizer; None where it is unknown.
        checksum: as ``TrainingData.tokenizer_sha256``.
        explicit: fields that the user set.

    Raises:
        ConfigError: a vocabulary or a checksum was asked for that the data does not have.
    """
    model, data = config.run.model, config.run.data
    if "model.vocab_size" in explicit:
        more = model.vocab_size - (model.vocab_size if vocab_size is None else vocab_size)
        # Of a classifier it is the number of classes: a class more would have no name.
        if more < 0 or (more and model.image_size):
            size = "small" if more < 0 else "large"
            ids = "classes of the images" if model.image_size else "ids of the data's tokenizer"
            raise ConfigError(
                f"model.vocab_size={model.vocab_size} is too {size} for the {vocab_size} {ids}; leave it out, and it "
                "follows the data"
            )
    elif vocab_size is None:
        raise ConfigError(
            f"the tokenizer of {data.path} is unknown (there is no .json beside it): name it with data.tokenizer, or "
            "set model.vocab_size"
        )
    else:
        model = model.model_copy(update={"vocab_size": vocab_size})
    if data.tokenizer_sha256 not in (None, checksum):
        raise ConfigError(
            f"data.tokenizer_sha256={data.tokenizer_sha256} is not that of the data, which is "
            f"{checksum or 'raw bytes'}; give data of the same tokenizer or leave the field out"
        )
    data = data.model_copy(update={"tokenizer_sha256": checksum})
    return replace(config, run=config.run.model_copy(update={"model": model, "data": data}))


def with_classes(config: EngineConfig, classes: tuple[str, ...]) -> EngineConfig:
    """The configuration with the names of the classes of its images."""
    data = config.run.data.model_copy(update={"classes": classes})
    return replace(config, run=config.run.model_copy(update={"data": data}))


def choose_run_dir(config: EngineConfig, explicit: bool, resume: str) -> Path | None:
    """The run folder: as given, or for the default name the first of ``NAME``, ``NAME-2`` … without a finished run.

    None where a job before this one, on which it depends (``submit.py --chain``), has finished the run.

    Raises:
        ConfigError: a finished run in a folder that was asked for, or checkpoints in the way of ``--resume never``.
    """
    wanted, steps = Path(config.run.run.run_dir), config.run.train.steps
    if not explicit:
        never = resume == "never"
        return first_free(wanted, lambda folder: steps_done(folder) >= steps or (never and has_run(folder)))
    if resume == "never" and has_run(wanted):
        raise ConfigError(f"run folder {wanted} already holds a run; choose another --run_dir, or --resume auto")
    done = steps_done(wanted)
    # Told by the steps: a chain that extends a finished run finds the report of that one.
    if resume == "auto" and done == steps and os.environ.get("SLURM_JOB_DEPENDENCY"):
        return None
    if resume == "auto" and done >= steps:
        raise ConfigError(
            f"run folder {wanted} holds a finished run of {done} steps; "
            "raise --train_steps above that to go on, or choose another --run_dir"
        )
    return wanted


def steps_done(folder: Path) -> int:
    """Steps of the finished run in a folder; 0 where there is none."""
    try:
        # FinalReport writes it last: a run without it is not finished.
        return int(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def _greeting(config: EngineConfig, data: TrainingData, run_dir: Path) -> list[str]:
    moe, run = config.run.moe, config.run
    hint = moe.facts.hint(run)
    route = f"{moe.router}, {moe.num_experts} experts, {run.model.layers} layers of width {run.model.width}"
    return [
        f"VQMoE pretraining: {route}; {config.world_size} rank(s), EP {config.ep_size}, "
        f"{config.sharing}ZeRO-{config.zero_stage}, {config.precision}",
        f"data: {data.summary()}; run folder: {run_dir}",
        *([data.note] if isinstance(data, RawText) and data.note else []),
        *([] if hint is None else [f"hint: {hint}"]),
    ]

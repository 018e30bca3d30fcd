"""Pretraining from a parsed command line: check everything, build, resume, train, report."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import to_yaml
from vqmoe_ds.data.corpus import Split, open_corpus, split_corpus, whole_corpus
from vqmoe_ds.errors import ConfigError, UserError
from vqmoe_ds.train.cli import config_from_args
from vqmoe_ds.train.console import Console
from vqmoe_ds.train.ranks import Place, find_place


def main(args: argparse.Namespace) -> int:
    """Run one pretraining; returns the exit code of the process."""
    started = time.time()
    place = find_place(args.local_rank)
    console = Console(place.rank)
    try:
        loaded = config_from_args(args)
        config = resolve(args.ds_config, loaded, place.world_size, args.ep_size)
        if args.print_config:
            if place.rank == 0:
                print(to_yaml(config.run) + "deepspeed: " + json.dumps(config.deepspeed, indent=2))
            return 0
        run_dir = choose_run_dir(config, "run.run_dir" in loaded.explicit, args.resume)
        train_split, valid_split = open_data(config)
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except UserError as error:
        return _leave_together(console.fail(error), place)
    except OSError as error:
        return _leave_together(console.fail(ConfigError(f"run folder cannot be made: {error}")), place)
    console.capture(run_dir / "logs" / f"rank{place.rank}.log")
    _greet(console, config, train_split, valid_split, run_dir)
    try:
        return _train(args, config, place, console, run_dir, train_split, valid_split, started)
    except BaseException as error:
        # Peers may sit in a collective: leave without waiting for them; the launcher ends them.
        os._exit(_leave_together(console.fail(error), place))


def _train(
    args: argparse.Namespace,
    config: EngineConfig,
    place: Place,
    console: Console,
    run_dir: Path,
    train_split: Split,
    valid_split: Split,
    started: float,
) -> int:
    from vqmoe_ds.train.allocator import tune_allocator

    tuned = tune_allocator()
    # Heavy imports only now: bad input has been answered, and their chatter goes to the log.
    from vqmoe_ds.checkpoint.session import choose, load
    from vqmoe_ds.data.batches import TrainingBatches
    from vqmoe_ds.evaluation.routing import RoutingHealth
    from vqmoe_ds.train import callbacks as cb
    from vqmoe_ds.train.engine import build_session, set_up_torch
    from vqmoe_ds.train.loop import Trainer

    if tuned:
        console.say(tuned)
    set_up_torch(place)
    checkpoints = run_dir / "checkpoints"
    tag, passed_over = choose(checkpoints, args.resume, place.rank)
    for reason in passed_over:
        console.say(f"passed over: {reason}")
    session = build_session(config, place, args.ds_config)
    step = 0
    if tag is not None:
        step = load(session, tag)
        console.say(f"resumed from {tag} at step {step}")
    if place.rank == 0:
        _write_config(run_dir, config)
    batches = TrainingBatches(train_split, config.run.train.batch_size, config.run.train.seed)
    file = cb.MetricsFile(run_dir, place.rank, step)
    health = RoutingHealth(session, valid_split, config.run.run.probe_tokens)
    trainer = Trainer(session, batches, [], step=step, last_checkpoint=str(tag) if tag else None)
    trainer.callbacks = [
        cb.Metrics(console, file, health),
        cb.Validation(console, file, valid_split),
        cb.Signals(),
        cb.Checkpoints(console, checkpoints),
        cb.FinalReport(console, file, valid_split, health, run_dir),
    ]
    counts = cb.parameter_counts(trainer)
    console.say(
        f"{counts['stored']:,} parameters, {counts['active']:,} used by a token; ready in {time.time() - started:.0f} s"
    )
    trainer.run()
    console.close_progress()
    file.close()
    return cb.Signals.exit_code if trainer.stop_reason else 0


def open_data(config: EngineConfig) -> tuple[Split, Split]:
    """Training and validation windows as the configuration asks."""
    data, length = config.run.data, config.run.model.sequence_length
    corpus = open_corpus(data.path)
    if data.valid_path is None:
        return split_corpus(corpus, length, data.holdout_every)
    return whole_corpus(corpus, length), whole_corpus(open_corpus(data.valid_path), length)


def choose_run_dir(config: EngineConfig, explicit: bool, resume: str) -> Path:
    """The run folder: as given, or for the default name the first of ``NAME``, ``NAME-2`` … without a finished run.

    Raises:
        ConfigError: a finished run in a folder that was asked for, or checkpoints in the way of ``--resume never``.
    """
    wanted = Path(config.run.run.run_dir)
    if not explicit:
        number, folder = 1, wanted
        while _finished(folder, config.run.train.steps) or (resume == "never" and _has_run(folder)):
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        return folder
    if resume == "never" and _has_run(wanted):
        raise ConfigError(f"run folder {wanted} already holds a run; choose another --run_dir, or --resume auto")
    if resume == "auto" and _finished(wanted, config.run.train.steps):
        raise ConfigError(
            f"run folder {wanted} holds a finished run of {config.run.train.steps} steps; "
            "raise --train_steps to go on, or choose another --run_dir"
        )
    return wanted


def _finished(folder: Path, steps: int) -> bool:
    try:
        return bool(json.loads((folder / "summary.json").read_text())["steps"] >= steps)
    except (OSError, ValueError, KeyError):
        return False


def _has_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()


def _greet(console: Console, config: EngineConfig, train: Split, valid: Split, run_dir: Path) -> None:
    moe, run = config.run.moe, config.run
    route = f"{moe.router.value}, {moe.num_experts} experts, {run.model.layers} layers of width {run.model.width}"
    console.say(
        f"VQMoE pretraining: {route}; {config.world_size} rank(s), EP {config.ep_size}, "
        f"ZeRO-{config.zero_stage}, {config.precision}"
    )
    windows = f"{len(train)} training and {len(valid)} held-out windows of {run.model.sequence_length}"
    console.say(f"data: {train.corpus.name}, {train.corpus.num_bytes:,} bytes ({windows}); run folder: {run_dir}")


def _write_config(run_dir: Path, config: EngineConfig) -> None:
    from vqmoe_ds.checkpoint.store import write_atomically

    write_atomically(run_dir / "config.yaml", to_yaml(config.run))
    write_atomically(run_dir / "ds_config.json", json.dumps(config.deepspeed, indent=2) + "\n")


def _leave_together(code: int, place: Place) -> int:
    """Give rank 0 time to print before the launcher, seeing one rank gone, ends the others."""
    if place.rank != 0:
        time.sleep(1.5)
    return code

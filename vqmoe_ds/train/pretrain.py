"""Pretraining from a parsed command line: check everything, build, resume, train, report."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import to_yaml
from vqmoe_ds.data.corpus import RawText, open_raw_text
from vqmoe_ds.data.indexed import open_indexed_text
from vqmoe_ds.data.training_data import TrainingData
from vqmoe_ds.errors import TRY_AGAIN, ConfigError, UserError
from vqmoe_ds.train.cli import config_from_args
from vqmoe_ds.train.console import Console
from vqmoe_ds.train.lock import RunLock
from vqmoe_ds.train.ranks import Place, find_place, likely_rank


def main(args: argparse.Namespace) -> int:
    """Run one pretraining; returns the exit code of the process."""
    started = time.time()
    try:
        place = find_place(args.local_rank)
    except UserError as error:
        return Console(likely_rank()).fail(error)
    console = Console(place.rank)
    leave_at_signals()
    try:
        loaded = config_from_args(args)
        config = resolve(args.ds_config, loaded, place.world_size, args.ep_size)
        prepared = open_indexed_text(config.run)
        vocab_size, checksum = RawText.vocab_size, RawText.tokenizer_sha256
        if prepared is not None:
            vocab_size, checksum = prepared.vocab_size, prepared.tokenizer_sha256
        config = fit_to_tokenizer(config, vocab_size, checksum, loaded.explicit)
        if args.print_config:
            if place.rank == 0:
                print(to_yaml(config.run) + "deepspeed: " + json.dumps(config.deepspeed, indent=2))
            return 0
        run_dir = choose_run_dir(config, "run.run_dir" in loaded.explicit, args.resume)
        data: TrainingData = prepared or open_raw_text(config.run)
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        lock = RunLock(run_dir) if place.rank == 0 else None
        if prepared is not None:
            index_folder(config, run_dir).mkdir(parents=True, exist_ok=True)
    except UserError as error:
        return leave_together(console.fail(error), place)
    except OSError as error:
        return leave_together(console.fail(ConfigError(f"a folder of the run cannot be made: {error}")), place)
    console.capture(run_dir / "logs" / f"rank{place.rank}.log")
    _greet(console, config, data, run_dir)
    try:
        code = _train(args, config, place, console, run_dir, data, started)
    except BaseException as error:
        # Peers may sit in a collective: leave without waiting for them; the launcher ends them.
        os._exit(leave_together(console.fail(error), place))
    if lock is not None:
        lock.release()
    return code


def _train(
    args: argparse.Namespace,
    config: EngineConfig,
    place: Place,
    console: Console,
    run_dir: Path,
    data: TrainingData,
    started: float,
) -> int:
    from vqmoe_ds.train.allocator import tune_allocator

    tuned = tune_allocator()
    # Heavy imports only now: bad input has been answered, and their chatter goes to the log.
    from vqmoe_ds.moe.routers import why_not_causal
    from vqmoe_ds.train.engine import set_up_torch

    if tuned:
        console.say(tuned)
    reason = why_not_causal(config.run)
    if reason is not None:
        console.say(f"not causal: {reason}; its losses compare with no causal router's, and there is no text sample")
    set_up_torch(place, config.run.run.start_timeout)
    with watch_peers(config, place, console):
        return _run(args, config, place, console, agree_on(run_dir, place), data, started)


def _run(
    args: argparse.Namespace,
    config: EngineConfig,
    place: Place,
    console: Console,
    run_dir: Path,
    data: TrainingData,
    started: float,
) -> int:
    from vqmoe_ds.checkpoint.session import check_fits, choose, consumed_samples, load
    from vqmoe_ds.evaluation.routing import RoutingHealth
    from vqmoe_ds.moe.kernels import build
    from vqmoe_ds.train import callbacks as cb
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer

    checkpoints = run_dir / "checkpoints"
    tag, passed_over = choose(checkpoints, args.resume, place.rank)
    for reason in passed_over:
        console.say(f"passed over: {reason}")
    if tag is not None:
        check_fits(config, tag)
    batches, windows = data.open(config.run, index_folder(config, run_dir))
    session = build_session(config, place, args.ds_config)
    if session.device.type == "cpu" and session.model.moe_layers():
        console.say(build.describe())
    step = samples = 0
    if tag is not None:
        step, samples = load(session, tag), consumed_samples(tag)
        console.say(f"resumed from {tag} at step {step}")
    if place.rank == 0:
        _write_config(run_dir, config)
    file = cb.MetricsFile(run_dir, place.rank, step)
    health = RoutingHealth(session, windows, config.run.run.probe_tokens)
    trainer = Trainer(session, batches, [], step, (step, samples), last_checkpoint=str(tag) if tag else None)
    trainer.callbacks = [
        cb.Metrics(console, file, health),
        cb.Validation(console, file, windows),
        cb.Signals(),
        cb.Checkpoints(console, checkpoints),
        cb.FinalReport(console, file, data, windows, health, run_dir),
    ]
    counts = cb.parameter_counts(trainer)
    console.say(
        f"{counts['stored']:,} parameters, {counts['active']:,} used by a token; ready in {time.time() - started:.0f} s"
    )
    trainer.run()
    console.close_progress()
    file.close()
    return TRY_AGAIN if trainer.stop_reason else 0


def fit_to_tokenizer(
    config: EngineConfig, vocab_size: int | None, checksum: str | None, explicit: frozenset[str]
) -> EngineConfig:
    """The configuration with the vocabulary and the tokenizer's checksum of the data.

    The vocabulary is not padded: ids that never occur would cost time in every product of the head. A larger
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
        if vocab_size is not None and model.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size={model.vocab_size} is too small for the {vocab_size} ids of the data's tokenizer; "
                "leave it out, and it follows the data"
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


def index_folder(config: EngineConfig, run_dir: Path) -> Path:
    """Where the order of prepared data is kept."""
    return Path(config.run.data.cache_dir or run_dir / "data_index")


def agree_on(run_dir: Path, place: Place) -> Path:
    """Rank 0's run folder, on every rank: a slow one may have found the first free name taken meanwhile."""
    if place.world_size == 1:
        return run_dir
    import torch.distributed as dist

    answer = [run_dir]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


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


def _greet(console: Console, config: EngineConfig, data: TrainingData, run_dir: Path) -> None:
    moe, run = config.run.moe, config.run
    route = f"{moe.router.value}, {moe.num_experts} experts, {run.model.layers} layers of width {run.model.width}"
    console.say(
        f"VQMoE pretraining: {route}; {config.world_size} rank(s), EP {config.ep_size}, "
        f"ZeRO-{config.zero_stage}, {config.precision}"
    )
    console.say(f"data: {data.summary()}; run folder: {run_dir}")


def _write_config(run_dir: Path, config: EngineConfig) -> None:
    from vqmoe_ds.files import write_atomically

    write_atomically(run_dir / "config.yaml", to_yaml(config.run))
    write_atomically(run_dir / "ds_config.json", json.dumps(config.deepspeed, indent=2) + "\n")


def watch_peers(config: EngineConfig, place: Place, console: Console) -> AbstractContextManager[Any]:
    """In this context a missing rank ends the others within ``run.peer_timeout``, with a sentence that names it."""
    if place.world_size == 1:
        return nullcontext()
    from vqmoe_ds.train.watchdog import PeerLost, Watchdog

    def leave(lost: PeerLost) -> None:
        os._exit(leave_together(console.fail(lost), place))

    return Watchdog(place, config.run.run.peer_timeout, leave)


def leave_at_signals() -> None:
    """Until training starts there is nothing to save: SIGTERM and SIGUSR1 end the process with "try again later"."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(TRY_AGAIN))


def leave_together(code: int, place: Place) -> int:
    """Give rank 0 time to print before the launcher, seeing one rank gone, ends the others."""
    if place.rank != 0:
        time.sleep(1.5)
    return code

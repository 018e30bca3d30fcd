"""What every training command does around its own work: find its place, refuse bad input, start, watch, leave."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.load import to_yaml
from vqmoe_ds.errors import TRY_AGAIN, ConfigError, UserError
from vqmoe_ds.files import write_atomically
from vqmoe_ds.train.console import Console
from vqmoe_ds.train.lock import RunLock
from vqmoe_ds.train.ranks import Place, find_place, from_first, likely_rank

if TYPE_CHECKING:
    import torch

    from vqmoe_ds.data.batches import Batches
    from vqmoe_ds.train.callbacks import MetricsFile
    from vqmoe_ds.train.engine import Session
    from vqmoe_ds.train.loop import Callback, Trainer


@dataclass(frozen=True)
class Job:
    """One run, on this rank. ``json_path`` and ``resume`` are as on the command line."""

    config: EngineConfig
    place: Place
    console: Console
    run_dir: Path
    json_path: str
    resume: str
    started: float
    """Seconds since the epoch, of the process."""

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"


@dataclass(frozen=True)
class Start:
    """A command line that was found good: where it runs, what to say first, and the work itself."""

    config: EngineConfig
    run_dir: Path
    work: Callable[[Job], int]
    """Called on every rank with torch and the process group up; returns the exit code."""
    greeting: Sequence[str] = ()
    folders: Sequence[Path] = ()
    """Made before the work begins, so that it is known that they can be."""


Prepare = Callable[[Place, Console], Start | None]


def launch(args: argparse.Namespace, prepare: Prepare) -> int:
    """Run a training command; returns the exit code of the process.

    Args:
        args: with ``ds_config``, ``resume`` and ``local_rank``.
        prepare: checks everything that can be checked before long work; None: there is nothing to run.
    """
    started = time.time()
    try:
        place = find_place(args.local_rank)
    except UserError as error:
        return Console(likely_rank()).fail(error)
    console = Console(place.rank)
    leave_at_signals()
    try:
        start = prepare(place, console)
        if start is None:
            return 0
        for folder in (start.run_dir / "logs", *start.folders):
            folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(start.run_dir) if place.rank == 0 else None
    except UserError as error:
        return leave_together(console.fail(error), place)
    except OSError as error:
        return leave_together(console.fail(ConfigError(f"a folder of the run cannot be made: {error}")), place)
    console.capture(start.run_dir / "logs" / f"rank{place.rank}.log")
    for line in start.greeting:
        console.say(line)
    try:
        code = _work(start, Job(start.config, place, console, start.run_dir, args.ds_config, args.resume, started))
    except BaseException as error:
        # Peers may sit in a collective: leave without waiting for them; the launcher ends them.
        os._exit(leave_together(console.fail(error), place))
    if lock is not None:
        lock.release()
    return code


def _work(start: Start, job: Job) -> int:
    from vqmoe_ds.train.allocator import tune_allocator

    tuned = tune_allocator()
    # Heavy imports only now: bad input has been answered, and their chatter goes to the log.
    from vqmoe_ds.device import memory_errors
    from vqmoe_ds.train.engine import set_up_torch

    if tuned:
        job.console.say(tuned)
    run, place = job.config.run, job.place
    device = set_up_torch(place, run.run.start_timeout, run.train.deterministic, partial(check_device, job))
    if device.type == "cuda":
        for line in _on_gpu(job.config, device):
            job.console.say(line)
    with (
        watch_peers(place, job.console, run.run.peer_timeout),
        memory_errors(place.rank, device, partial(_what_would_fit, job, device)),
    ):
        return start.work(replace(job, run_dir=from_first(job.run_dir)))


def check_device(job: Job, device: torch.device) -> None:
    """Refuse a GPU that cannot run the job.

    Raises:
        ConfigError: it has no bf16, or too little memory whatever happens.
    """
    if device.type != "cuda":
        return
    from vqmoe_ds.device import check_precision, total_memory
    from vqmoe_ds.planning.fit import too_large

    remedy = (
        f'in DeepSpeed config {job.json_path} set "fp16": {{"enabled": true}}, or "bf16": {{"enabled": false}} for fp32'
    )
    check_precision(device, job.config.precision, remedy)
    sentence = too_large(job.config, job.place.rank, total_memory(device))
    if sentence is not None:
        raise ConfigError(sentence)


def _what_would_fit(job: Job, device: torch.device) -> str:
    from vqmoe_ds.device import total_memory
    from vqmoe_ds.planning.fit import advice

    return advice(job.config, job.place.rank, total_memory(device))


def _on_gpu(config: EngineConfig, device: torch.device) -> list[str]:
    """What the user should know of a run on GPUs: the card, and the choices that are made for it."""
    from vqmoe_ds.config.gpu import attention_hint
    from vqmoe_ds.device import describe

    params, exact = config.deepspeed["optimizer"].get("params", {}), config.run.train.deterministic
    adam = ", fused Adam" if params.get("fused") else ""
    sums = "deterministic (bit-exact resume)" if exact else "fast attention backward (not bit-exact)"
    hint = attention_hint(config.run, config.precision)
    return [f"GPU: {describe(device)}; {config.precision}{adam}; {sums}", *([hint] if hint else [])]


# ---------------------------------------------------------------- the run itself


@dataclass(frozen=True)
class Opened:
    """A session that is ready to train, and where its run stands."""

    session: Session
    tag: Path | None
    """The checkpoint it was resumed from."""
    step: int = 0
    samples: int = 0

    def metrics_file(self, job: Job) -> MetricsFile:
        from vqmoe_ds.train.callbacks import MetricsFile

        return MetricsFile(job.run_dir, job.place.rank, -1 if self.tag is None else self.step)

    def trainer(self, batches: Batches) -> Trainer:
        from vqmoe_ds.train.loop import Trainer

        at = (self.step, self.samples)
        return Trainer(self.session, batches, [], self.step, at, last_checkpoint=str(self.tag) if self.tag else None)


def find_tag(job: Job) -> Path | None:
    """The checkpoint to resume from, checked against the configuration; None: the run starts anew."""
    from vqmoe_ds.checkpoint.session import check_fits, choose

    tag, passed_over = choose(job.checkpoints, job.resume, job.place.rank)
    for reason in passed_over[:10]:
        job.console.say(f"passed over: {reason}")
    if len(passed_over) > 10:
        job.console.say(f"passed over: {len(passed_over) - 10} more that do not verify")
    if tag is not None:
        check_fits(job.config, tag)
    return tag


def open_session(job: Job, tag: Path | None, begin: Callable[[Session], Any] | None = None) -> Opened:
    """Build the session and fill it from ``tag``; or else let ``begin`` fill it, where weights come from elsewhere."""
    from vqmoe_ds.checkpoint.session import consumed_samples, load
    from vqmoe_ds.moe.kernels import build
    from vqmoe_ds.train.engine import build_session

    session = build_session(job.config, job.place, job.json_path)
    if session.device.type == "cpu" and session.model.moe_layers():
        job.console.say(build.describe())
    opened = Opened(session, tag)
    if tag is not None:
        opened = Opened(session, tag, load(session, tag), consumed_samples(tag))
        job.console.say(f"resumed from {tag} at step {opened.step}")
    elif begin is not None:
        begin(session)
    if job.place.rank == 0:
        write_atomically(job.run_dir / "config.yaml", to_yaml(job.config.run))
        write_atomically(job.run_dir / "ds_config.json", json.dumps(job.config.deepspeed, indent=2) + "\n")
    return opened


def run_to_the_end(job: Job, trainer: Trainer, callbacks: list[Callback], file: MetricsFile) -> int:
    """Train; returns the exit code."""
    from vqmoe_ds.train.callbacks import parameter_counts

    trainer.callbacks = callbacks
    counts, seconds = parameter_counts(trainer), time.time() - job.started
    job.console.say(f"{counts['stored']:,} parameters, {counts['active']:,} used by a token; ready in {seconds:.0f} s")
    trainer.run()
    job.console.close_progress()
    file.close()
    return TRY_AGAIN if trainer.stop_reason else 0


# ---------------------------------------------------------------- run folders


def first_free(wanted: Path, taken: Callable[[Path], bool]) -> Path:
    """The first of ``NAME``, ``NAME-2``, … that is not taken."""
    number, folder = 1, wanted
    while taken(folder):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def has_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()


def show(config: EngineConfig, place: Place, console: Console) -> None:
    """What ``--print_config`` prints."""
    if place.rank == 0:
        text = to_yaml(config.run) + "deepspeed: " + json.dumps(config.deepspeed, indent=2)
        print(text, file=console.out, flush=True)


# ---------------------------------------------------------------- leaving


def watch_peers(
    place: Place, console: Console, seconds: float, mend: str = "the same command goes on from the last checkpoint"
) -> AbstractContextManager[Any]:
    """In this context a missing rank ends the others within ``seconds``, with a sentence that names it."""
    if place.world_size == 1:
        return nullcontext()
    from vqmoe_ds.train.watchdog import PeerLost, Watchdog

    def leave(lost: PeerLost) -> None:
        os._exit(leave_together(console.fail(lost), place))

    return Watchdog(place, seconds, leave, mend)


def leave_at_signals() -> None:
    """Until training starts there is nothing to save: SIGTERM and SIGUSR1 end the process with "try again later"."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(TRY_AGAIN))


def leave_together(code: int, place: Place) -> int:
    """Give rank 0 time to print before the launcher, seeing one rank gone, ends the others."""
    if place.rank != 0:
        time.sleep(1.5)
    return code

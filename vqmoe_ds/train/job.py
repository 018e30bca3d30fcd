"""A training command and the one way to run it: find its place, refuse bad input, start, watch, leave."""

from __future__ import annotations

import argparse
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.load import to_yaml
from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.errors import ConfigError, UserError
from vqmoe_ds.runtime.files import drop_output, make_folder
from vqmoe_ds.runtime.importing import quickly
from vqmoe_ds.runtime.leaving import cannot_write, hear_requests, leave_together, watch_peers
from vqmoe_ds.runtime.lock import RunLock
from vqmoe_ds.runtime.ranks import Place, find_place, from_first, likely_rank
from vqmoe_ds.train.loggers import require_loggers
from vqmoe_ds.train.run_folder import in_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Job:
    """One run, on this rank. ``json_path``, ``resume``, ``allow_changed_data`` and ``profile`` are as on the command
    line."""

    config: EngineConfig
    place: Place
    console: Console
    json_path: str
    resume: str
    allow_changed_data: bool
    started: float
    """Seconds since the epoch, of the process."""
    profile: tuple[int | None, int] | None = None

    @property
    def run_dir(self) -> Path:
        """Its folder, as ``config.yaml`` and checkpoints name it."""
        return Path(self.config.run.run.run_dir)

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"


@dataclass(frozen=True)
class Start:
    """A command line that was found good: its run folder, and the lines to say first."""

    config: EngineConfig
    run_dir: Path
    greeting: Sequence[str] = ()
    folders: Sequence[Path] = ()
    """Made before the work begins, so that it is known that they can be."""


class TrainingCommand(ABC):
    """A command that trains: ``launch`` calls ``prepare``, then ``run``.

    Args:
        args: its parsed command line, with ``ds_config``, ``resume``, ``allow_changed_data``, ``profile`` and
            ``local_rank``.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @abstractmethod
    def prepare(self, place: Place, console: Console) -> Start | None:
        """Check everything that can be checked before long work, and keep what ``run`` needs.

        Returns:
            None where there is nothing to run.

        Raises:
            UserError: the command line, the configuration or the data cannot work.
        """

    @abstractmethod
    def run(self, job: Job) -> int:
        """Do the work; called on every rank with torch and the process group up. Returns the exit code."""


def launch(command: TrainingCommand) -> int:
    """Run a training command on this rank; returns the exit code of the process."""
    started, args = time.time(), command.args
    try:
        place = find_place(args.local_rank)
    except UserError as error:
        return Console(likely_rank(), __name__).fail(error)
    console = Console(place.rank, __name__)
    # Before prepare, which may tokenize for long: from here on a killed launcher does not leave the rank behind.
    hear_requests(place, console)
    try:
        start = command.prepare(place, console)
        if start is None:
            return 0
        # Before anything is made: a package that is missing leaves no run folder behind.
        require_loggers(start.config.run.run.log_to)
        lock, refusal = _enter(start, place, console)
    except Exception as error:  # a defect, too: standard error may be captured by now
        return leave_together(console.fail(error), place)
    for line in start.greeting:
        console.say(line)
    try:
        config = in_folder(start.config, start.run_dir)
        options = (args.ds_config, args.resume, args.allow_changed_data)
        code = _run(command, Job(config, place, console, *options, started, args.profile), refusal)
    except BaseException as error:
        # Peers may sit in a collective: leave without waiting for them; the launcher ends them.
        os._exit(leave_together(console.fail(error), place))
    # After an error the kernel frees the lock, and the next job finds its holder dead.
    if lock is not None:
        lock.release()
    return code


def _enter(start: Start, place: Place, console: Console) -> tuple[RunLock | None, ConfigError | None]:
    """Make the folders of the run, and log there; the lock of rank 0, or why it did not get it, for all ranks to meet.

    Raises:
        ConfigError: a folder cannot be made, or that of a single rank is in use.
    """
    lock, refusal = None, None
    try:
        for folder in (start.run_dir / "logs", *start.folders):
            make_folder(folder)
        # Rank 0 alone: record locks exclude other processes, so ranks of one run would refuse each other.
        lock = RunLock(start.run_dir) if place.rank == 0 else None
    except OSError as error:
        reason = error if error.filename else error.strerror
        raise ConfigError(f"a folder of the run cannot be made: {reason}") from None
    except ConfigError as error:
        if place.world_size == 1:
            raise
        refusal = error  # the others would wait for this rank where they meet
    console.capture(start.run_dir / "logs" / f"rank{place.rank}.log")
    return lock, refusal


def _run(command: TrainingCommand, job: Job, refusal: ConfigError | None = None) -> int:
    """Set up torch and the process group, and run the command under the eyes of its peers, unless one refuses."""
    from vqmoe_ds.runtime.allocator import tune_allocator

    tuned = tune_allocator()
    with quickly():  # heavy imports only now: bad input has been answered, and their chatter goes to the log
        import vqmoe_ds.train.engine  # noqa: F401
        from vqmoe_ds.runtime.device import memory_errors
        from vqmoe_ds.runtime.torch_setup import set_up_torch

    if tuned:
        job.console.say(tuned)
    run, place = job.config.run, job.place
    device = set_up_torch(place, run.run.start_timeout, run.train.deterministic, partial(check_start, job, refusal))
    if device.type == "cuda":
        for line in _on_gpu(job.config, device):
            job.console.say(line)
    # The watchdog is the outer one: it tells the other ranks of what ran out of memory on this rank alone.
    with (
        watch_peers(place, job.console, run.run.peer_timeout),
        memory_errors(place.rank, device, partial(_what_would_fit, job, device)),
    ):
        try:
            return command.run(replace(job, config=in_folder(job.config, from_first(job.run_dir))))
        except OSError as error:  # in here, so that the other ranks are told
            raise cannot_write(error, "nothing new was saved") from error


def check_start(job: Job, refusal: ConfigError | None, device: torch.device) -> None:
    """Refuse a GPU or a machine that cannot run the job, or what this rank found out before.

    Raises:
        ConfigError: that, or the GPU has no bf16, or there is too little memory whatever happens.
    """
    if refusal is not None:
        raise refusal
    if device.type != "cuda":
        from vqmoe_ds.planning.host import check_host_memory

        # Before the model is built: a process that takes too much is killed by the system, without a sentence.
        check_host_memory(job.config, job.place)
        return
    from vqmoe_ds.planning.fit import too_large
    from vqmoe_ds.runtime.device import check_precision, total_memory

    remedy = (
        f'in DeepSpeed config {job.json_path} set "fp16": {{"enabled": true}}, or "bf16": {{"enabled": false}} for fp32'
    )
    check_precision(device, job.config.precision, remedy)
    sentence = too_large(job.config, job.place.rank, total_memory(device))
    if sentence is not None:
        raise ConfigError(sentence)


def _what_would_fit(job: Job, device: torch.device) -> str:
    from vqmoe_ds.planning.fit import advice
    from vqmoe_ds.runtime.device import total_memory

    return advice(job.config, job.place.rank, total_memory(device))


def _on_gpu(config: EngineConfig, device: torch.device) -> list[str]:
    """Lines for the user of a run on GPUs: the card, and the choices that are made for it."""
    from vqmoe_ds.config.gpu import attention_hint
    from vqmoe_ds.runtime.device import describe

    params, exact = config.deepspeed["optimizer"].get("params", {}), config.run.train.deterministic
    adam = ", fused Adam" if params.get("fused") else ""
    sums = "deterministic (bit-exact resume)" if exact else "fast attention backward (not bit-exact)"
    hint = attention_hint(config.run, config.precision)
    return [f"GPU: {describe(device)}; {config.precision}{adam}; {sums}", *([hint] if hint else [])]


def show(config: EngineConfig, place: Place, console: Console) -> None:
    """Print the configuration, for ``--print_config``."""
    if place.rank == 0:
        text = to_yaml(config.run) + "deepspeed: " + json.dumps(config.deepspeed, indent=2)
        try:
            print(text, file=console.out, flush=True)
        except BrokenPipeError:  # a reader that has seen enough
            drop_output()

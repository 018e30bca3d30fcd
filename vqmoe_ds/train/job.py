"""What every training command does around its own work: find its place, refuse bad input, start, watch, leave."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.load import to_yaml
from vqmoe_ds.runtime.console import Console
from vqmoe_ds.runtime.errors import TRY_AGAIN, ConfigError, UserError
from vqmoe_ds.runtime.files import make_folder, write_atomically
from vqmoe_ds.runtime.importing import quickly
from vqmoe_ds.runtime.leaving import cannot_write, hear_requests, leave_together, watch_peers
from vqmoe_ds.runtime.lock import RunLock
from vqmoe_ds.runtime.ranks import Place, find_place, from_first, likely_rank

if TYPE_CHECKING:
    import torch

    from vqmoe_ds.data.batches import Batches
    from vqmoe_ds.models.session import Session
    from vqmoe_ds.train.callbacks import MetricsFile
    from vqmoe_ds.train.loop import Callback, Trainer


@dataclass(frozen=True)
class Job:
    """One run, on this rank. ``json_path``, ``resume`` and ``allow_changed_data`` are as on the command line."""

    config: EngineConfig
    place: Place
    console: Console
    run_dir: Path
    json_path: str
    resume: str
    allow_changed_data: bool
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
        args: with ``ds_config``, ``resume``, ``allow_changed_data`` and ``local_rank``.
        prepare: checks everything that can be checked before long work; None: there is nothing to run.
    """
    started = time.time()
    try:
        place = find_place(args.local_rank)
    except UserError as error:
        return Console(likely_rank()).fail(error)
    console = Console(place.rank)
    hear_requests(place, console)
    try:
        start = prepare(place, console)
        if start is None:
            return 0
        for folder in (start.run_dir / "logs", *start.folders):
            make_folder(folder)
        lock = RunLock(start.run_dir) if place.rank == 0 else None
        console.capture(start.run_dir / "logs" / f"rank{place.rank}.log")
    except UserError as error:
        return leave_together(console.fail(error), place)
    except OSError as error:
        reason = error if error.filename else error.strerror
        return leave_together(console.fail(ConfigError(f"a folder of the run cannot be made: {reason}")), place)
    for line in start.greeting:
        console.say(line)
    try:
        options = (args.ds_config, args.resume, args.allow_changed_data)
        code = _work(start, Job(start.config, place, console, start.run_dir, *options, started))
    except BaseException as error:
        # Peers may sit in a collective: leave without waiting for them; the launcher ends them.
        os._exit(leave_together(console.fail(error), place))
    if lock is not None:
        lock.release()
    return code


def _work(start: Start, job: Job) -> int:
    from vqmoe_ds.runtime.allocator import tune_allocator

    tuned = tune_allocator()
    with quickly():  # heavy imports only now: bad input has been answered, and their chatter goes to the log
        import vqmoe_ds.train.engine  # noqa: F401
        from vqmoe_ds.runtime.device import memory_errors
        from vqmoe_ds.runtime.torch_setup import set_up_torch

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
        try:
            return start.work(replace(job, run_dir=from_first(job.run_dir)))
        except OSError as error:  # in here, so that the other ranks are told
            raise cannot_write(error, "nothing new was saved") from error


def check_device(job: Job, device: torch.device) -> None:
    """Refuse a GPU that cannot run the job.

    Raises:
        ConfigError: it has no bf16, or too little memory whatever happens.
    """
    if device.type != "cuda":
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
    """What the user should know of a run on GPUs: the card, and the choices that are made for it."""
    from vqmoe_ds.config.gpu import attention_hint
    from vqmoe_ds.runtime.device import describe

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

        file = MetricsFile(job.run_dir, job.place.rank, -1 if self.tag is None else self.step)
        file.note("configuration", f"```yaml\n{to_yaml(job.config.run)}\n```", self.step)
        return file

    def trainer(self, batches: Batches) -> Trainer:
        from vqmoe_ds.train.loop import Trainer

        at = (self.step, self.samples)
        return Trainer(self.session, batches, [], self.step, at, last_checkpoint=str(self.tag) if self.tag else None)


def find_tag(job: Job, fingerprint: dict[str, str]) -> tuple[Path | None, Job]:
    """The checkpoint to resume from, checked against configuration and data (None: the run starts anew), and the job
    with the schedule that follows from it."""
    from vqmoe_ds.checkpoint.resume.session import check_data, check_fits, choose

    tag, passed_over = choose(job.checkpoints, job.resume, job.place.rank)
    for reason in passed_over[:10]:
        job.console.say(f"passed over: {reason}")
    if len(passed_over) > 10:
        job.console.say(f"passed over: {len(passed_over) - 10} more that do not verify")
    if tag is not None:
        check_fits(job.config, tag)
        changed = check_data(fingerprint, tag, job.allow_changed_data)
        if changed is not None:
            job.console.say(changed)
        job = _with_schedule(job, tag)
    return tag, job


def _with_schedule(job: Job, tag: Path) -> Job:
    from vqmoe_ds.checkpoint.resume.store import read_manifest
    from vqmoe_ds.train.schedule import continued

    manifest, run = read_manifest(tag), job.config.run
    saved = manifest["config"]["train"]
    changed = [
        f"train.{name}={getattr(run.train, name):g} ({saved[name]:g} before)"
        for name in ("batch_size", "weight_decay", "beta1", "beta2", "grad_clip")
        if saved.get(name, getattr(run.train, name)) != getattr(run.train, name)
    ]
    if changed:
        job.console.say(f"goes on with {', '.join(changed)}")
    if "scheduler" in job.config.deepspeed:
        return job
    train, sentence = continued(saved, int(manifest["step"]), run.train)
    if sentence is not None:
        job.console.say(sentence)
    return replace(job, config=replace(job.config, run=run.model_copy(update={"train": train})))


def open_session(
    job: Job, tag: Path | None, fingerprint: dict[str, str], begin: Callable[[Session], Any] | None = None
) -> Opened:
    """Build the session and fill it from ``tag``; or else let ``begin`` fill it, where weights come from elsewhere."""
    from vqmoe_ds.checkpoint.resume.session import consumed_samples, load
    from vqmoe_ds.checkpoint.resume.whereabouts import keep_tokenizer
    from vqmoe_ds.moe.kernels import build
    from vqmoe_ds.train.compiling import before_compiling
    from vqmoe_ds.train.engine import build_session

    compiling = before_compiling(job.config.deepspeed)
    if compiling is not None:
        job.console.say(compiling)
    session = build_session(job.config, job.place, job.json_path)
    session.fingerprint = fingerprint
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
        keep_tokenizer(job.config.run, job.run_dir)
    return opened


def run_to_the_end(job: Job, trainer: Trainer, callbacks: list[Callback], file: MetricsFile) -> int:
    """Train; returns the exit code."""
    from vqmoe_ds.train.callbacks import parameter_counts

    trainer.callbacks = callbacks
    counts, seconds = parameter_counts(trainer), time.time() - job.started
    job.console.say(f"{counts['stored']:,} parameters, {counts['active']:,} used by a token; ready in {seconds:.0f} s")
    train = job.config.run.train
    if train.steps <= train.warmup_steps and "scheduler" not in job.config.deepspeed:
        job.console.say(
            f"train.steps={train.steps} end within the warm-up of train.warmup_steps={train.warmup_steps}: the "
            "learning rate never reaches its peak"
        )
    try:
        trainer.run()
        file.close()
    except OSError as error:
        raise cannot_write(error, f"training stopped at step {trainer.step}, {trainer.what_is_left()}") from error
    job.console.close_progress()
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

"""The opening of a run: the checkpoint it goes on from, its session, and training to the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vqmoe_ds.checkpoint.io.store import read_manifest
from vqmoe_ds.checkpoint.resume.session import begun_from, check_data, check_fits, choose, consumed_samples, load
from vqmoe_ds.checkpoint.whereabouts import keep_tokenizer
from vqmoe_ds.config.load import to_yaml
from vqmoe_ds.data.batches import Batches
from vqmoe_ds.models.session import Session
from vqmoe_ds.moe.kernels import build
from vqmoe_ds.runtime.errors import TRY_AGAIN, of_one_rank
from vqmoe_ds.runtime.files import write_atomically, write_json
from vqmoe_ds.runtime.leaving import cannot_write
from vqmoe_ds.train.callbacks import MetricsFile, parameter_counts
from vqmoe_ds.train.compiling import before_compiling
from vqmoe_ds.train.engine import build_session
from vqmoe_ds.train.job import Job
from vqmoe_ds.train.loggers import open_loggers
from vqmoe_ds.train.loop import Callback, Trainer
from vqmoe_ds.train.profiling import Profile
from vqmoe_ds.train.schedule import continued, learning_rate, misfits

_MAY_CHANGE = {
    "train": ("batch_size", "weight_decay", "beta1", "beta2", "grad_clip", "label_smoothing", "seed"),
    "data": ("separate_documents", "augment", "mixup", "cutmix"),
}
"""Fields by section that a resumed run takes as they are now, and names where they changed."""


@dataclass(frozen=True)
class Opened:
    """A session that is ready to train, and the state of its run."""

    job: Job
    session: Session
    tag: Path | None
    """The checkpoint it was resumed from."""
    step: int = 0
    samples: int = 0

    def metrics_file(self) -> MetricsFile:
        # -1 drops rows of step 0, too, which a new run writes again; one that is resumed at step 0 keeps them.
        job, step = self.job, -1 if self.tag is None else self.step
        first = job.place.rank == 0
        with of_one_rank():
            loggers = open_loggers(job.config, job.run_dir, step, job.console.say) if first else []
        return MetricsFile(job.run_dir, job.place.rank, step, loggers)

    def train(self, batches: Batches, callbacks: list[Callback], file: MetricsFile) -> int:
        """Train to the end, or until a request to stop; returns the exit code.

        Raises:
            TrainingHalted: a file of the run cannot be written.
        """
        job, train, at = self.job, self.job.config.run.train, (self.step, self.samples)
        last = str(self.tag) if self.tag else None
        if job.profile is not None:
            callbacks = [Profile(job.profile, job.run_dir, job.place.rank, job.console.say), *callbacks]
        trainer = Trainer(self.session, batches, callbacks, self.step, at, last_checkpoint=last)
        counts, seconds = parameter_counts(trainer), time.time() - job.started
        job.console.say(
            f"{counts['stored']:,} parameters, {counts['active']:,} used by a token; ready in {seconds:.0f} s"
        )
        for sentence in misfits(train, job.config.deepspeed.get("scheduler")):
            job.console.say(sentence)
        try:
            trainer.run()
            code = TRY_AGAIN if trainer.stop_reason else 0
            file.close(code)
        except OSError as error:
            # Here, where the last good checkpoint is known; train/job.py could not name it.
            raise cannot_write(error, f"training stopped at step {trainer.step}, {trainer.what_is_left()}") from error
        job.console.close_progress()
        return code


def find_tag(job: Job, fingerprint: dict[str, str]) -> tuple[Path | None, Job]:
    """The checkpoint to resume from, checked against configuration and data (None: the run starts anew), and the job
    with the schedule that follows from it."""
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
    elif job.config.run.finetune.checkpoint is None:
        run = job.config.run
        run.moe.facts.check_start(run, len(run.model.moe_blocks))
    return tag, job


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _with_schedule(job: Job, tag: Path) -> Job:
    manifest, run = read_manifest(tag), job.config.run
    saved = manifest["config"]["train"]
    changed = [
        f"{section}.{name}={_written(value)} ({_written(there[name])} before)"
        for section, names in _MAY_CHANGE.items()
        for there, here in [(manifest["config"].get(section, {}), run.model_dump(mode="json")[section])]
        for name, value in here.items()
        if name in names and there.get(name, value) != value
    ]
    if changed:
        job.console.say(f"goes on with {', '.join(changed)}")
    # DeepSpeed's scheduler sets the rate then, and goes on from its own state in the checkpoint.
    if "scheduler" in job.config.deepspeed:
        return job
    step = int(manifest["step"])
    if (manifest.get("data") or {}).get("scheduler", "null") != "null":  # what its rate was, no schedule here knows
        rate = learning_rate(step, run.train)
        job.console.say(f"the learning rate of step {step + 1} is {rate:.3g}, as section train has it")
        return job
    train, sentence = continued(saved, step, run.train)
    if sentence is not None:
        job.console.say(sentence)
    return replace(job, config=replace(job.config, run=run.model_copy(update={"train": train})))


def open_session(
    job: Job, tag: Path | None, fingerprint: dict[str, str], begin: Callable[[Session], Any] | None = None
) -> Opened:
    """Build the session and fill it from ``tag``; or else let ``begin`` fill it, where weights come from elsewhere."""
    compiling = before_compiling(job.config.deepspeed)
    if compiling is not None:
        job.console.say(compiling)
    session = build_session(job.config, job.place, job.json_path)
    session.fingerprint, session.begun_from = fingerprint, begun_from(job.resume, tag)
    if session.device.type == "cpu" and session.model.moe_layers():
        job.console.say(build.describe())
    opened = Opened(job, session, tag)
    if tag is not None:
        opened = Opened(job, session, tag, load(session, tag), consumed_samples(tag))
        job.console.say(f"resumed from {tag} at step {opened.step}")
    elif begin is not None:
        begin(session)
    # After the load: a resume that is refused leaves the configuration in its folder as it was.
    if job.place.rank == 0:
        write_atomically(job.run_dir / "config.yaml", to_yaml(job.config.run))
        write_json(job.run_dir / "ds_config.json", job.config.deepspeed, indent=2)
        with of_one_rank():
            keep_tokenizer(job.config.run, job.run_dir)
    return opened

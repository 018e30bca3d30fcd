"""Execution of a grid's runs: finished ones are kept, killed ones go on, changed ones are not mixed in."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vqmoe_ds.checkpoint.whereabouts import with_whole_paths
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.reading import parse_yaml
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.at_start import to_prepare
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.indexed import open_indexed_text
from vqmoe_ds.data.raw_text import open_raw_text
from vqmoe_ds.evaluation.command import check_attacks
from vqmoe_ds.evaluation.corruption import all_corruptions, parse_corruption
from vqmoe_ds.evaluation.evaluate import checked_stride
from vqmoe_ds.evaluation.image_damage import KINDS as KINDS_OF_IMAGES
from vqmoe_ds.evaluation.image_damage import parse_image_corruption
from vqmoe_ds.experiments.grid import Evaluation, Grid, Run, overrides_of
from vqmoe_ds.experiments.measures import CLEAN, EVALUATION, losses, read_json
from vqmoe_ds.runtime.errors import TRY_AGAIN, CheckpointError, ConfigError, DataError, UserError, reason_of, shown
from vqmoe_ds.runtime.files import make_folder, open_regular, read_small
from vqmoe_ds.train.pretrain import fit_to_data, steps_done

ROOT = Path(__file__).resolve().parents[2]
"""Folder in which Python finds the package."""
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make a run part of another one."""
_LAST = 1 << 20
"""Bytes read from the end of a run's log."""


class State(StrEnum):
    NEW = "new"
    UNFINISHED = "unfinished"
    TRAINED = "trained"
    """Finished, but not evaluated as the grid asks."""
    FINISHED = "finished"
    CHANGED = "changed"
    """Made with another configuration than the grid has now."""


@dataclass(frozen=True)
class Job:
    """A run and the configuration it resolves to."""

    run: Run
    config: EngineConfig
    arguments: list[str]
    """Arguments of ``vqmoe_ds.commands.pretrain``."""
    wanted: Evaluation | None
    """Scoring of the trained run; None: none."""

    @property
    def trained(self) -> bool:
        """Whether all steps are done; the report of fewer stays while a finished run is taken on to more."""
        return steps_done(self.run.folder) >= self.config.run.train.steps

    @property
    def evaluation(self) -> Path:
        return self.run.folder / EVALUATION

    @property
    def finished(self) -> bool:
        """Trained to the end with this configuration."""
        return self.state() in (State.TRAINED, State.FINISHED)

    def state(self) -> State:
        """State of the run folder; raises as ``difference``."""
        recorded = self.run.folder / "config.yaml"
        if not recorded.exists():
            return State.NEW
        if self.difference() is not None:
            return State.CHANGED
        if not self.trained:
            return State.UNFINISHED
        return State.FINISHED if self.wanted is None or self.evaluated(self.wanted) else State.TRAINED

    def evaluated(self, wanted: Evaluation) -> bool:
        """Whether the run has been scored in just this way."""
        if not self.evaluation.exists():
            return False
        try:
            return _scored(read_json(self.evaluation), self.config.run) == _to_score(wanted, self.config.run)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False  # it is scored again

    def difference(self) -> str | None:
        """The first field in which the recorded run differs from the grid, as a clause; None where none does.

        Raises:
            ConfigError: what was recorded is there and cannot be read now.
        """
        folder = self.run.folder
        try:
            config, engine_config = (read_small(folder / name) for name in ("config.yaml", "ds_config.json"))
            recorded = RunConfig.model_validate(parse_yaml(config.decode(), "config.yaml"))
            engine = json.loads(engine_config)
        except (FileNotFoundError, ValueError, UserError, RecursionError) as error:
            return f"a configuration that cannot be read ({reason_of(error, 200)})"
        except OSError as error:
            # No difference: a run of another configuration may be thrown away, this one may be whole.
            reason = error.strerror or error
            raise ConfigError(f"the configuration of {folder} cannot be read ({reason}); fix that first") from None
        there, here = (_fields(with_whole_paths(config)) for config in (recorded, self.config.run))
        for name, value in here.items():
            if there.get(name) != value:
                return f"{name}={there.get(name)}, the grid says {value}"
        return None if engine == self.config.deepspeed else "another DeepSpeed configuration"


def jobs_of(grid: Grid, runs: list[Run]) -> list[Job]:
    """The runs with their configurations.

    Raises:
        UserError: of the first configuration or data that cannot work; its entry is named.
    """
    return [_job(grid, run) for run in runs]


def _job(grid: Grid, run: Run) -> Job:
    overrides, preset = overrides_of(grid, run), run.entry.preset or grid.preset
    try:
        loaded = load_config(preset, None, overrides)
        # ``_execute`` starts one process for a run: its micro-batches are those of one rank.
        config, data = fit_to_data(resolve(grid.ds_config, loaded, world_size=1), loaded.explicit)
        if to_prepare(config.run):
            raise ConfigError(
                f"data.tokenizer={config.run.data.tokenizer} would prepare {config.run.data.path} in every run; "
                "prepare it for all of them (tools/prepare_data.py)"
            )
        if data is None:
            open_raw_text(config.run)  # refused now, not by the run
        if grid.evaluate is not None:
            _to_score(grid.evaluate, config.run)
            for path in grid.evaluate.shift:
                _check_shift(path, config.run)
    except UserError as error:
        raise type(error)(f"entry {run.entry.name} of the grid, corpus {run.corpus}: {error}") from None
    # JSON, as --set reads YAML: strings that look like numbers stay strings.
    sets = [f"--set={name}={json.dumps(value)}" for name, value in overrides.items()]
    arguments = ["--ds_config", grid.ds_config, "--preset", preset, *sets, "--resume", "auto"]
    return Job(run, config, arguments, grid.evaluate)


def _check_shift(path: str, config: RunConfig) -> None:
    data = config.data.model_copy(update={"path": path, "valid_path": None})
    try:
        if open_indexed_text(config.model_copy(update={"data": data})) is None:
            open_corpus(path)
    except DataError as error:
        raise DataError(f"evaluate: shift: {error}") from None


def _to_score(wanted: Evaluation, config: RunConfig) -> set[tuple[Any, ...]]:
    """What is to be scored, an entry for each damage and setting.

    Raises:
        ConfigError: a damage or an attack that the data cannot take.
    """
    asked: set[tuple[Any, ...]] = {("max_tokens", wanted.max_tokens)}
    if config.model.image_size:
        for name, left_out in (("shift", []), ("stride", None)):
            if getattr(wanted, name) != left_out:
                raise ConfigError(f"evaluate: {name} is for text, and this model classifies images; leave it out")
        check_attacks(wanted.attacks, wanted.eps)
        specs = [kind for spec in wanted.corrupt for kind in (KINDS_OF_IMAGES if spec == "all" else (spec,))]
        asked |= {(name, eps) for name in wanted.attacks for eps in wanted.eps}
        return asked | {tuple(each) for spec in specs for each in parse_image_corruption(spec)}
    if wanted.attacks:
        raise ConfigError("evaluate: attacks are for images, and this is a model of text; leave them out")
    kinds = [each for s in wanted.corrupt for each in (all_corruptions() if s == "all" else [parse_corruption(s)])]
    asked.add(("stride", checked_stride(wanted.stride, config.model.sequence_length)))
    asked |= {("shift", path) for path in wanted.shift}
    return asked | {(*each, wanted.seeds) for each in kinds}


def _scored(recorded: dict[str, Any], config: RunConfig) -> set[tuple[Any, ...]]:
    """What ``launchers/evaluate.py`` scored, as ``_to_score`` has it."""
    damaged, setting = recorded["corrupted"], recorded["setting"]
    found: set[tuple[Any, ...]] = {("max_tokens", setting.get("max_tokens"))}
    if config.model.image_size:
        found |= {(row["attack"], row["eps"]) for row in recorded["attacked"]}
        return found | {(row["kind"], row["severity"]) for row in damaged}
    found.add(("stride", setting["stride"]))
    found |= {("shift", row["text"]) for row in recorded.get("shifted", [])}  # one made before that was scored has none
    return found | {(row["kind"], row["rate"], len(row["seeds"])) for row in damaged}


def _fields(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> value of all that decides a result."""
    sections = config.model_dump(mode="json")
    fields = {f"{section}.{name}": value for section, part in sections.items() for name, value in part.items()}
    # Folders that were moved or cleared change no result.
    return {name: value for name, value in fields.items() if name not in ("run.run_dir", "data.cache_dir")}


def check_folders(jobs: list[Job], rerun_changed: bool) -> None:
    """Refuse what cannot be continued; folders of another configuration are removed where that was asked for.

    Raises:
        ConfigError: a run was made with another configuration, or its router cannot start.
        CheckpointError: a finished run is to be evaluated, and its checkpoint is gone.
    """
    for job in jobs:
        state = job.state()
        if state is State.CHANGED and not rerun_changed:
            raise ConfigError(
                f"run {job.run} in {job.run.folder} was made with {job.difference()}; --changed rerun trains it anew, "
                "another --out keeps both"
            )
        checkpoints = job.run.folder / "checkpoints"
        # Evaluation takes sealed tags of a run alone, and those have a manifest.
        sealed = any(checkpoints.glob("*/manifest.json"))
        if state in (State.NEW, State.CHANGED) or (state is State.UNFINISHED and not sealed):
            _check_start(job)
        if state is State.TRAINED and not sealed:
            raise CheckpointError(
                f"run {job.run} is to be evaluated on damaged data, but {checkpoints} holds no checkpoint any more; "
                f"remove {job.run.folder} to train it again, or evaluate: from the grid"
            )


def _check_start(job: Job) -> None:
    run = job.config.run
    try:
        run.moe.facts.check_start(run, len(run.model.moe_blocks))
    except ConfigError as error:
        raise ConfigError(f"entry {job.run.entry.name}: {error}") from None


class Runner:
    """Runs jobs as processes, ``workers`` at a time.

    Args:
        prefix: words before every command, such as ``nice -n 10`` or ``srun -n 1``.
        rerun_changed: as of ``check_folders``.
        say: prints a line.

    Raises:
        ConfigError: the prefix names no command.
    """

    def __init__(self, jobs: list[Job], workers: int, prefix: str, rerun_changed: bool, say: Any) -> None:
        self.jobs, self.workers, self.prefix, self.say = jobs, workers, _words(prefix), say
        self.rerun_changed = rerun_changed
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self) -> list[str]:
        """Run what is not finished; returns a sentence for each run that failed."""
        # Threads only wait for processes; Ctrl-C reaches the main thread, which waits for their answers.
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                return [answer for answer in pool.map(self._run_one, self.jobs) if answer]
            except KeyboardInterrupt:
                self._stop()
                raise

    def _stop(self) -> None:
        """Runs save and leave; the same command goes on."""
        self._stopped = True
        for process in list(self._running):
            # A run leads a group of its own (``start_new_session``), which has its pid, the words of --prefix included.
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGTERM)

    def _run_one(self, job: Job) -> str | None:
        try:
            if self._stopped or job.state() is State.FINISHED:
                return None
            try:
                make_folder(job.run.folder)
            except OSError as error:
                raise ConfigError(f"run folder {job.run.folder} cannot be made ({error.strerror})") from None
            with _lock(job.run.folder) as lock:
                if lock is None:
                    self.say(f"{job.run}: another process is at it")
                    return None
                # Once more: while it waited for its turn another tool may have trained it.
                check_folders([job], self.rerun_changed)
                if job.state() is State.CHANGED:
                    _empty(job.run.folder)
                started = time.time()
                failure = self._train_and_evaluate(job, lock)
            if failure is None:
                self.say(f"{job.run}: {_result(job)} in {time.time() - started:.0f} s")
            return failure
        except UserError as error:  # the other runs go on
            return f"{job.run}: {error}"

    def _train_and_evaluate(self, job: Job, lock: int) -> str | None:
        log = job.run.folder / "run.log"
        if not job.trained:
            failure = self._execute(job, ["vqmoe_ds.commands.pretrain", *job.arguments], log, lock)
            if failure is not None:
                return failure
        if job.wanted is not None and not job.evaluated(job.wanted):
            return self._execute(job, _evaluation_command(job, job.wanted), log, lock)
        return None

    def _execute(self, job: Job, command: list[str], log: Path, lock: int) -> str | None:
        """Run a module to its end; returns a sentence if it failed."""
        environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
        # In place of the current folder, which -P below leaves out: the package need not be installed.
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        if self.workers > 1:  # else the launcher takes all cores
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        # Appended: a run that goes on keeps what it said before it was killed.
        with log.open("ab") as output:
            # The child holds the lock too: a killed tool leaves no second process in the same folder.
            process = subprocess.Popen(
                [*self.prefix, sys.executable, "-P", "-m", *command],  # -P: the modules of this folder are not ours
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C reaches it through _stop alone
            )
            # By this number a run can be ended whose tool was killed.
            os.truncate(lock, 0)
            os.pwrite(lock, f"{process.pid}\n".encode(), 0)
            self._running.add(process)
            if self._stopped:  # while it was being started
                self._stop()
            code = process.wait()
            self._running.discard(process)
        if code == 0:
            return None
        # A run that does not listen yet ends by the signal itself.
        if code == TRY_AGAIN or self._stopped:
            return f"{job.run}: stopped; the same command goes on"
        return f"{job.run}: exit code {code}, {_last_words(log)} ({log})"


def _words(prefix: str) -> list[str]:
    try:
        words = shlex.split(prefix)
    except ValueError as error:
        raise ConfigError(
            f"--prefix {shown(prefix)} is no command ({reason_of(error)}); quote it as for a shell"
        ) from None
    if words and shutil.which(words[0]) is None:
        raise ConfigError(f"--prefix {shown(prefix)}: there is no command {shown(words[0])}; correct its name")
    return words


def _evaluation_command(job: Job, wanted: Evaluation) -> list[str]:
    options = [] if wanted.stride is None else ["--stride", str(wanted.stride)]
    for spec in wanted.corrupt:
        options += ["--corruptions", "all"] if spec == "all" else ["--corrupt", spec]
    if wanted.max_tokens is not None:
        options += ["--max_tokens", str(wanted.max_tokens)]
    if wanted.attacks:
        options += ["--attacks", *wanted.attacks, "--eps", *map(str, wanted.eps)]
    if wanted.shift:
        options += ["--shift", *wanted.shift]
    options += ["--seeds", str(wanted.seeds), "--json", str(job.evaluation)]
    return ["vqmoe_ds.commands.evaluate", str(job.run.folder), *options]


def _last_words(log: Path) -> str:
    """The last line that names an error, else the last line."""
    with open_regular(log) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST))
        lines = file.read(_LAST).decode(errors="replace").strip().splitlines() or ["without a word"]
    errors = [line for line in lines if re.match(r"error:|\w*(Error|Halted)\b", line)]
    return (errors or lines)[-1]


def _result(job: Job) -> str:
    values, unit = losses(job.run.folder)
    return f"{values[CLEAN]:.4f} {unit}"


@contextmanager
def _lock(folder: Path) -> Iterator[int | None]:
    """A lock on a run folder, as a file descriptor; None where another process holds it."""
    # O_NOFOLLOW: behind a link in its place ``os.truncate`` would empty another file.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(folder / ".lock", flags, 0o644)
    except OSError as error:
        raise ConfigError(
            f"run folder {folder} cannot be locked ({error.strerror}); remove {folder / '.lock'}"
        ) from None
    with open(descriptor, "wb") as file:  # whose pid it holds, stays
        try:
            # Not ``lockf``: locks of POSIX belong to a process, and the child that goes on would not hold it.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file.fileno()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        # Made anew it would be another file, which a second tool could lock beside this one.
        if path.name == ".lock":
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

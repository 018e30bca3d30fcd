"""Loggers beside ``metrics.jsonl``, on rank 0: TensorBoard, Weights & Biases and MLflow (``run.log_to``)."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqmoe_ds.config.deepspeed_json import EngineConfig, leaves
from vqmoe_ds.config.load import to_yaml
from vqmoe_ds.config.schema import LogTo
from vqmoe_ds.runtime.errors import ConfigError, one_line
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.files import read_small, write_json

IDS = "loggers.json"
"""File of the run folder: name of a logger -> its id of the run, by which a resumed run continues its curves."""
PROJECT = "vqmoe_ds"
"""Of Weights & Biases, and the experiment of MLflow, unless their own environment variables name another."""
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 6000
"""MLflow's limits: of one ``log_batch``, and characters of a parameter's value."""


class Logger(ABC):
    """Takes what ``metrics.jsonl`` gets."""

    id: str | None = None
    """The run's, where the library gives it one."""

    @abstractmethod
    def write(self, scalars: dict[str, float], step: int) -> None:
        """Log the figures of one row."""

    @abstractmethod
    def note(self, name: str, text: str, step: int) -> None:
        """Log a text, in Markdown."""

    @abstractmethod
    def close(self, code: int) -> None:
        """End the session: 0, the run is finished; else it was stopped, to be resumed."""


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics by name, those of a list as ``name/layer0``, ..."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            found.update({f"{name}/layer{layer}": entry for layer, entry in enumerate(value)})
        elif isinstance(value, int | float) and name != "step":
            found[name] = value
    return found


class TensorBoard(Logger):
    """Event files in ``tensorboard/`` of the run folder.

    Args:
        facts: as ``_facts``, for the other loggers.
        step: the one that the run was resumed at; -1: it is new.
    """

    def __init__(
        self, config: EngineConfig, facts: dict[str, Any], run_dir: Path, step: int, known: str | None
    ) -> None:
        library("tensorboard", "that")
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then hides what was logged after the checkpoint, for these steps come again.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self.note("configuration", f"```yaml\n{to_yaml(config.run)}\n```", max(step, 0))

    def write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def note(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self, code: int) -> None:
        self._writer.close()


class WeightsAndBiases(Logger):
    """A run of Weights & Biases; ``known`` is the id of the run to continue.

    Raises:
        ConfigError: no connection or no login; ``WANDB_MODE=offline`` needs neither.
    """

    def __init__(
        self, config: EngineConfig, facts: dict[str, Any], run_dir: Path, step: int, known: str | None
    ) -> None:
        wandb = library("wandb", "run.log_to=wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", run_dir.name),
                dir=str(run_dir),
                id=known,
                resume="allow" if known else None,
                reinit="create_new",  # not that of DeepSpeed's own monitor, whose steps are samples
                config=facts,
                settings=wandb.Settings(console="off"),  # the terminal and the logs are the console's
            )
        except wandb.Error as error:
            raise ConfigError(
                f"run.log_to=wandb: {one_line(str(error))}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self.id = self._run.id

    def write(self, scalars: dict[str, float], step: int) -> None:
        # Steps between the checkpoint and a kill come again with the same values: W&B keeps the first.
        self._run.log(scalars, step=step)

    def note(self, name: str, text: str, step: int) -> None:
        self._run.summary[name] = text

    def close(self, code: int) -> None:
        self._run.finish(exit_code=code)


class MLflow(Logger):
    """A run of MLflow, at ``MLFLOW_TRACKING_URI`` or where MLflow has its runs without it; ``known`` as above.

    Raises:
        ConfigError: no connection, or the run to continue is not there.
    """

    def __init__(
        self, config: EngineConfig, facts: dict[str, Any], run_dir: Path, step: int, known: str | None
    ) -> None:
        mlflow = library("mlflow", "run.log_to=mlflow")
        self._entities = mlflow.entities
        try:
            self._client = mlflow.MlflowClient()
            self.id = known or self._begin(facts, run_dir.name)
            # Also for a run that goes on: close may have ended it, and one that is gone is found out here.
            self._client.update_run(self.id, "RUNNING")
        except (mlflow.exceptions.MlflowException, ImportError) as error:  # databases need more packages than servers
            remedy = f"give the MLFLOW_TRACKING_URI of before, or delete {run_dir / IDS} to begin another run"
            raise ConfigError(
                f"run.log_to=mlflow, {mlflow.get_tracking_uri()}: {one_line(str(error))}"
                + (f"; {remedy}" if known else "; set MLFLOW_TRACKING_URI")
            ) from None

    def _begin(self, facts: dict[str, Any], name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        there = self._client.get_experiment_by_name(experiment)
        number = there.experiment_id if there else self._client.create_experiment(experiment)
        run_id: str = self._client.create_run(number, run_name=os.environ.get("MLFLOW_RUN_NAME", name)).info.run_id
        params = [self._entities.Param(key, str(value)[:LONGEST_PARAM]) for key, value in leaves(facts)]
        for part in _parts(params, MOST_PARAMS):
            self._client.log_batch(run_id, params=part)
        return run_id

    def write(self, scalars: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in scalars.items()]
        for part in _parts(metrics, MOST_METRICS):
            self._client.log_batch(self.id, metrics=part)

    def note(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self.id, text, f"{name}.md")

    def close(self, code: int) -> None:
        self._client.set_terminated(self.id, "KILLED" if code else "FINISHED")


KINDS: dict[LogTo, type[TensorBoard | WeightsAndBiases | MLflow]] = {
    LogTo.TENSORBOARD: TensorBoard,
    LogTo.WANDB: WeightsAndBiases,
    LogTo.MLFLOW: MLflow,
}


class Forgiving(Logger):
    """A logger whose failures do not end a training: after the first it is left out until the run is resumed."""

    def __init__(self, name: str, inner: Logger, say: Callable[[str], None]) -> None:
        self.name, self.say, self.id = name, say, inner.id
        self._inner: Logger | None = inner

    def write(self, scalars: dict[str, float], step: int) -> None:
        self._try(lambda inner: inner.write(scalars, step))

    def note(self, name: str, text: str, step: int) -> None:
        self._try(lambda inner: inner.note(name, text, step))

    def close(self, code: int) -> None:
        self._try(lambda inner: inner.close(code))

    def _try(self, act: Callable[[Logger], None]) -> None:
        if self._inner is None:
            return
        try:
            act(self._inner)
        except Exception as error:  # of a server or a network, as a library that is not ours words it
            self._inner = None
            self.say(f"{self.name} gets nothing more until the run is resumed: {one_line(str(error))}")


def require_loggers(names: Sequence[LogTo] | None) -> None:
    """Refuse a logger whose package is missing.

    Raises:
        ConfigError: with the extra that brings it.
    """
    for name in names or ():
        library(name.value, f"run.log_to={name}")


def open_loggers(config: EngineConfig, run_dir: Path, step: int, say: Callable[[str], None]) -> list[Logger]:
    """The loggers of ``run.log_to``, with the configuration logged; called on rank 0.

    Args:
        step: the one that the run was resumed at; -1: it is new.

    Raises:
        ConfigError: one cannot start.
    """
    wanted, loggers = config.run.run.log_to, dict[str, Logger]()
    # A run that begins anew, as after a kill before its first checkpoint, gets curves of its own.
    known, facts = _read_ids(run_dir) if step >= 0 else {}, _facts(config)
    for name in (LogTo.TENSORBOARD,) if wanted is None else dict.fromkeys(wanted):
        try:
            logger = KINDS[name](config, facts, run_dir, step, known.get(name))
        except ConfigError as missing:
            if wanted is not None:
                raise
            say(f"events for TensorBoard are left out: {missing}")
            continue
        # TensorBoard has no id and no service that fails by itself; without the run's disk the run ends in any case.
        loggers[name] = logger if logger.id is None else Forgiving(name, logger, say)
    ids = {name: logger.id for name, logger in loggers.items() if logger.id is not None}
    if ids:
        # Those of loggers that are left out this time stay, for a later resume.
        write_json(run_dir / IDS, {**known, **ids})
    return list(loggers.values())


def _read_ids(run_dir: Path) -> dict[str, str]:
    try:
        found = json.loads(read_small(run_dir / IDS))
    except (OSError, ValueError):
        return {}
    return (
        {str(name): value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
    )


def _facts(config: EngineConfig) -> dict[str, Any]:
    """The configuration and the layout of a run, as nested dictionaries."""
    return {**config.run.model_dump(mode="json"), "layout": config.layout(), "deepspeed": config.deepspeed}


def _parts(entries: list[Any], size: int) -> list[list[Any]]:
    return [entries[start : start + size] for start in range(0, len(entries), size)]

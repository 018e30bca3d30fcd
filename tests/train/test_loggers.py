"""Metrics reach TensorBoard, Weights & Biases and MLflow as they reach ``metrics.jsonl``, over resumes too.

The last two run for real, offline, where their packages are: ``pip install 'vqmoe_ds[wandb,mlflow]'``.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import warm
from tests.distributed import _free_port
from tests.launchers.test_pretrain import LAUNCHER, environment, small  # noqa: F401
from vqmoe_ds.config.load import load_config, to_yaml
from vqmoe_ds.config.schema import LogTo
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.train.loggers import Forgiving, Logger, require_loggers, scalars

Curves = dict[str, dict[int, float]]


def _train(small: list[str], folder: Path, steps: int, log_to: str, **env: str) -> Any:  # noqa: F811
    words = ["--run_dir", str(folder / "run"), "--train_steps", str(steps), "--set", f"run.log_to={log_to}"]
    words += ["--set", "train.extension=keep", "--set", "run.log_every=2"]
    offline = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "HOME": str(folder)}
    command = [*LAUNCHER, *small, *words]
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": folder}  # MLflow's artifacts go there
    return warm.run(command, env={**environment(), **offline, **env}, **options)


def _wandb(folder: Path, run_id: str) -> tuple[Curves, dict[str, Any], str]:
    """All sessions of a run as ``wandb sync`` would send them: curves, configuration, and how it ended."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    curves: Curves = {}
    config: dict[str, Any] = {}
    code = None
    files = sorted((folder / "run/wandb").glob(f"offline-run-*/run-{run_id}.wandb"), key=lambda p: p.stat().st_mtime)
    for path in files:
        for content in _leveldb_records(path.read_bytes()):
            record = pb.Record.FromString(content)
            if record.HasField("history"):
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for name, value in row.items():
                    curves.setdefault(name, {})[int(row["_step"])] = value
            elif record.HasField("run"):
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("exit"):
                code = record.exit.exit_code
    return curves, config, "FINISHED" if code == 0 else f"exit {code}"


def _leveldb_records(content: bytes, block: int = 32768) -> Iterator[bytes]:
    """Records of W&B's transaction log, which is leveldb's with 7 bytes before it: checksum, length, kind, content."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def _mlflow(folder: Path, run_id: str) -> tuple[Curves, dict[str, Any], str]:
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.get_run(run_id)
    histories = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    assert all(len({metric.step for metric in history}) == len(history) for history in histories.values())
    curves = {name: {metric.step: metric.value for metric in history} for name, history in histories.items()}
    return curves, run.data.params, run.info.status


@pytest.mark.parametrize(("package", "name", "read"), [("wandb", "wandb", _wandb), ("mlflow", "mlflow", _mlflow)])
def test_a_resumed_run_continues_the_curves_of_the_metrics_file(small, tmp_path, package, name, read):  # noqa: F811
    pytest.importorskip(package, reason=f"needs pip install 'vqmoe_ds[{name}]'")
    assert (done := _train(small, tmp_path, 6, f"tensorboard,{name}")).returncode == 0, done.stderr
    ids = json.loads((tmp_path / "run/loggers.json").read_text())
    assert (done := _train(small, tmp_path, 12, f"tensorboard,{name}")).returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/loggers.json").read_text()) == ids and list(ids) == [name]
    curves, config, status = read(tmp_path, ids[name])
    expected: Curves = {}
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in scalars(row).items():
            expected.setdefault(key, {})[row["step"]] = value
    assert sorted(expected["loss"]) == [2, 4, 6, 8, 10, 12]
    assert {key: curves[key] for key in expected} == expected
    assert status == "FINISHED"
    told = config["model"]["width"] if name == "wandb" else int(config["model.width"])
    zero = config["layout"]["zero_stage"] if name == "wandb" else int(config["layout.zero_stage"])
    assert (told, zero) == (32, 2)
    assert done.stderr == "" and not any("wandb:" in line or "mlflow." in line for line in done.stdout.splitlines())


def test_deepspeeds_own_run_of_weights_and_biases_stays_apart(small, tmp_path):  # noqa: F811
    pytest.importorskip("wandb", reason="needs pip install 'vqmoe_ds[wandb]'")
    values = {"zero_optimization": {"stage": 2}, "wandb": {"enabled": True, "project": "theirs"}}
    (tmp_path / "ds.json").write_text(json.dumps(values))
    words = ["--ds_config", str(tmp_path / "ds.json"), *small[2:]]
    assert (done := _train(words, tmp_path, 4, "wandb")).returncode == 0, done.stderr
    (ours,) = json.loads((tmp_path / "run/loggers.json").read_text()).values()
    curves, _, status = _wandb(tmp_path, ours)
    assert list(curves["loss"]) == [2, 4] and "Train/Samples/lr" not in curves and status == "FINISHED"


def test_a_run_of_mlflow_that_is_gone_is_one_sentence(small, tmp_path):  # noqa: F811
    pytest.importorskip("mlflow", reason="needs pip install 'vqmoe_ds[mlflow]'")
    assert (done := _train(small, tmp_path, 2, "mlflow")).returncode == 0, done.stderr
    done = _train(small, tmp_path, 4, "mlflow", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/other.db")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "run.log_to=mlflow" in done.stderr and f"or delete {tmp_path}/run/loggers.json" in done.stderr


def test_weights_and_biases_without_a_login_is_one_sentence(small, tmp_path):  # noqa: F811
    pytest.importorskip("wandb", reason="needs pip install 'vqmoe_ds[wandb]'")
    done = _train(small, tmp_path, 2, "wandb", WANDB_MODE="online", WANDB_API_KEY="", NETRC=str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "run.log_to=wandb: " in done.stderr and "or set WANDB_MODE=offline" in done.stderr


def test_a_logger_that_rank_0_cannot_open_ends_all_ranks_with_its_code(small, tmp_path):  # noqa: F811
    refusing = "class Error(Exception): ...\ndef Settings(**_): ...\ndef init(**_): raise Error('no API key')\n"
    (tmp_path / "wandb.py").write_text(refusing)
    words = ["--run_dir", str(tmp_path / "run"), "--set", "run.log_to=wandb"]
    command, pipe = [sys.executable, "-m", "vqmoe_ds.commands.pretrain", *small, *words], subprocess.PIPE
    options: dict[str, Any] = {"cwd": tmp_path, "stdout": pipe, "stderr": pipe, "text": True}
    ranks = warm.start_ranks(2, command, _free_port(), environment(), **options)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], "a job script would requeue 76"
    assert said[0].startswith("error: run.log_to=wandb: no API key; log in") and said[1] == ""


@pytest.mark.parametrize(("package", "brings"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_named_before_anything_is_made(small, tmp_path, package, brings):  # noqa: F811
    code = f"import sys, runpy; sys.modules['{package}'] = None; "
    code += "runpy.run_module('vqmoe_ds.commands.pretrain', run_name='__main__')"
    words = [*small, "--run_dir", str(tmp_path / "run"), "--set", f"run.log_to={package}"]
    done = warm.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    sentence = f"run.log_to={package} needs {brings}, which is not installed here: pip install 'vqmoe_ds[{package}]'"
    assert done.stderr == f"error: {sentence}\n"
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_was_asked_for_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    require_loggers(None)
    with pytest.raises(ConfigError, match=r"run.log_to=tensorboard needs tensorboard, .*\[tensorboard\]"):
        require_loggers([LogTo.TENSORBOARD])


def test_no_logger_leaves_the_metrics_file_alone(small, tmp_path):  # noqa: F811
    assert (done := _train(small, tmp_path, 2, "[]")).returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "metrics.jsonl" in names and not names & {"tensorboard", "wandb", "loggers.json"}


def test_names_are_read_as_a_list_or_with_commas():
    for given in ("wandb, mlflow", ["wandb", "mlflow"]):
        config = load_config(overrides={"run.log_to": given}).config
        assert config.run.log_to == (LogTo.WANDB, LogTo.MLFLOW)
        assert yaml.safe_load(to_yaml(config))["run"]["log_to"] == ["wandb", "mlflow"]
    with pytest.raises(ConfigError, match="run.log_to.*'tensorboard', 'wandb' or 'mlflow'"):
        load_config(overrides={"run.log_to": "tensorbord"})


def test_a_logger_that_fails_is_left_out_and_named_once():
    class Server(Logger):
        id, got = "1", 0

        def write(self, scalars: dict[str, float], step: int) -> None:
            self.got += 1
            if step == 2:
                raise ConnectionError("no route to host")

        def note(self, name: str, text: str, step: int) -> None: ...

        def close(self, code: int) -> None:
            raise AssertionError("it was left out")

    server, said = Server(), list[str]()
    logger = Forgiving("mlflow", server, said.append)
    for step in (1, 2, 3):
        logger.write({"loss": 1.0}, step)
    logger.close(0)
    assert server.got == 2
    assert said == ["mlflow gets nothing more until the run is resumed: no route to host"]

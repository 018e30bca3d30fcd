"""DeepSpeed's operators: what has to be compiled is said before, and a lock that nobody holds is broken."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.train import compiling
from vqmoe_ds.train.compiling import before_compiling, operator_of

ADAM = {"optimizer": {"type": "AdamW", "params": {}}}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert before_compiling(ADAM) is not None
    [folder] = tmp_path.rglob("fused_adam")
    return folder


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (ADAM, "fused_adam"),
        ({"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}, None),
        ({**ADAM, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "cpu_adam"),
        ({**ADAM, "zero_optimization": {"offload_optimizer": {"device": "none"}}}, "fused_adam"),
        ({"optimizer": {"type": "Lion"}}, "fused_lion"),
        ({"optimizer": {"type": "SGD"}}, None),
    ],
)
def test_the_operator_follows_from_the_optimizer(values: dict, name: str | None) -> None:
    assert operator_of(values) == name


def test_only_what_is_not_there_is_announced(folder: Path) -> None:
    sentence = before_compiling(ADAM)
    assert sentence is not None and str(folder) in sentence and '"torch_adam": true' in sentence
    (folder / "fused_adam.so").touch()
    assert before_compiling(ADAM) is None


def test_a_lock_stays_while_somebody_builds_there_and_goes_when_he_is_gone(folder: Path) -> None:
    (folder / "lock").touch()
    builder = subprocess.Popen(["sleep", "60"], cwd=folder)
    try:
        before_compiling(ADAM)
        assert (folder / "lock").exists()
    finally:
        builder.kill()
        builder.wait()
    before_compiling(ADAM)
    assert not (folder / "lock").exists()


def test_where_other_hosts_may_build_only_age_tells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_is_shared", lambda folder: True)
    (folder / "lock").touch()
    before_compiling(ADAM)
    assert (folder / "lock").exists()
    long_ago = time.time() - 3600
    os.utime(folder / "lock", (long_ago, long_ago))
    before_compiling(ADAM)
    assert not (folder / "lock").exists()


def test_a_disk_is_refused_where_its_operator_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    values = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/d"}}}
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ConfigError, match="ds.json: to offload to nvme .* libaio"):
        compiling.check_nvme(values, "ds.json")
    compiling.check_nvme({"zero_optimization": {"offload_param": None, "offload_optimizer": {"device": "cpu"}}}, "")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    compiling.check_nvme(values, "ds.json")

"""docs/add-a-router.md is true: its plug-in runs, keeps the contracts, and survives a kill of nothing but its file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm
from tests.plugins import loaded
from vqmoe_ds.config import routers as registry
from vqmoe_ds.config.load import field_table, load_config
from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer
from vqmoe_ds.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/add-a-router.md").read_text(encoding="utf-8")


def _source(number: int = 0) -> str:
    """The page's file, or another of its Python blocks."""
    found: list[str] = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    return found[number]


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    """The page's file, loaded as ``--plugin`` does; forgotten afterwards."""
    file = tmp_path / "my_router.py"
    file.write_text(_source(), encoding="utf-8")
    with loaded(file, "sigmoid"):
        yield file


def test_the_page_is_short() -> None:
    lines = [line for line in _source().splitlines() if line.strip()]
    assert len(lines) < 40


def test_its_router_keeps_the_contracts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the page's own test."""
    (tmp_path / "my_router.py").write_text(_source(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(registry.PLUGINS, "")
    assert "sigmoid" not in registry.routers()
    names: dict[str, Any] = {}
    try:
        exec(_source(1), names)
        names["test_sigmoid_keeps_the_contracts"]()
    finally:
        registry._ROUTERS.pop("sigmoid", None)
        sys.modules.pop("vqmoe_plugin_my_router", None)


def test_its_options_are_checked_and_listed(plugin: Path) -> None:
    asked = {"moe.router": "sigmoid", "router.rate": 0.5}
    assert load_config("tiny", None, asked).config.router.model_dump() == {"rate": 0.5}
    assert next(row for row in field_table() if row.name == "router.rate").meaning.startswith("sigmoid: how far")
    with pytest.raises(ConfigError, match=r"router\.rate=5"):
        load_config("tiny", None, {**asked, "router.rate": 5})
    layer = MoELayer(LayerConfig(16, MoEConfig(router="sigmoid", num_experts=4, top_k=2), {"rate": 0.1}))
    assert layer(torch.randn(2, 3, 16))[2].shape == (6, 2)


TRAIN = ["launchers/pretrain.py", "--config", "small.yaml", "--data", "text.txt", "--run_dir", "run"]
PLUG = ["--plugin", "my_router.py"]


@pytest.fixture
def ran(tmp_path: Path) -> Callable[..., str]:
    """Runs a command in a folder with the page's router, and returns what it printed."""
    (tmp_path / "my_router.py").write_text(_source(), encoding="utf-8")
    (tmp_path / "text.txt").write_text(" ".join(f"{i} words make {i * i % 97} stories." for i in range(900)))
    (tmp_path / "small.yaml").write_text(
        "model: {layers: 2, width: 16, heads: 2, sequence_length: 16}\n"
        "moe: {router: sigmoid, num_experts: 4, expert_hidden: 16, top_k: 2}\n"
        "train: {batch_size: 4, warmup_steps: 2}\nrun: {probe_tokens: 64, sample_tokens: 5}\n"
    )

    def run(*words: str, code: int = 0, start: Any = warm.run) -> str:
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = start(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return run


def test_it_trains_resumes_evaluates_and_generates_from_the_command_line(ran: Callable[..., str]) -> None:
    ran(*TRAIN, *PLUG, "--train_steps", "3", start=subprocess.run)
    assert "resumed from" in ran(*TRAIN, *PLUG, "--train_steps", "5")
    assert "bits/byte" in ran("launchers/evaluate.py", "run", *PLUG)
    assert "step 5" in ran("tools/inspect_checkpoint.py", "run", *PLUG)
    assert "1" in ran("tools/generate.py", "run", "--prompt", "1 words", "--tokens", "4", *PLUG)
    without = ran("launchers/evaluate.py", "run", code=2)
    assert "moe.router='sigmoid' is unknown" in without and "--plugin" in without and "Traceback" not in without


def test_a_weight_without_dimensions_is_named(ran: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "my_router.py"
    gate = "        self.gate = "
    file.write_text(file.read_text().replace(gate, f"        self.gain = nn.Parameter(torch.tensor(1.0))\n{gate}"))
    refused = ran(*TRAIN, *PLUG, code=2)
    assert re.search(r"error: the parameter \S+router\.gain has no dimensions, .*: give it shape \[1\]", refused)
    assert "JSON" not in refused and "Traceback" not in refused


def test_a_plug_in_whose_name_is_too_long_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="does not exist; --plugin takes a Python file"):
        registry.load_plugin(f"{'n' * 300}.py")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "does not exist"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise SystemError('no')", "SystemError: no"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("from vqmoe_ds.moe import *\n@register_router('vq')\nclass Mine(Router): pass", "router 'vq' is vqmoe_ds"),
        ("from vqmoe_ds.moe import *\n@register_router('My Router')\nclass Mine(Router): pass", "lower-case letters"),
        ("from vqmoe_ds.moe import *\n@register_router('mine')\nclass Mine: pass", "is no subclass of"),
        ("class", "SyntaxError"),
    ],
)
def test_a_plug_in_that_cannot_be_is_refused_in_a_sentence(text: str | None, part: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        registry.load_plugin(file)
    assert part in str(refusal.value) and str(file) in str(refusal.value) and "\n" not in str(refusal.value)
    assert "vqmoe_plugin_broken" not in sys.modules and "mine" not in registry.routers()

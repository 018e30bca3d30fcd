"""``vqmoe_ds.moe`` as a library: every name has an example that runs, types hold, and importing it is cheap."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vqmoe_ds import moe
from vqmoe_ds.config import routers as registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _routers_of_examples_are_forgotten() -> Iterator[None]:
    known = dict(registry.routers())
    yield
    for name in set(registry.routers()) - set(known):
        registry._ROUTERS.pop(name)


@pytest.mark.parametrize("name", moe.__all__)
def test_every_name_has_an_example_that_runs(name: str) -> None:
    examples = doctest.DocTestFinder(recurse=False).find(getattr(moe, name), name, globs={})
    assert sum(len(example.examples) for example in examples) >= 2, f"{name} shows no use"
    with torch.random.fork_rng():
        for example in examples:
            report: list[str] = []
            assert doctest.DocTestRunner().run(example, out=report.append).failed == 0, "".join(report)


def test_the_reference_lists_the_names() -> None:
    page = (ROOT / "docs/api.md").read_text("utf-8")
    assert sorted(re.findall(r"^::: vqmoe_ds\.moe\.(\w+)$", page, re.MULTILINE)) == sorted(moe.__all__)
    assert page.count(":::") == len(moe.__all__)


def test_typed_use_runs() -> None:
    from tests.moe.typed_use import train_once  # registers a router, which the fixture forgets

    loss, health = train_once()
    assert loss > 0 and [found.codes for found in health] == [8]


def test_importing_it_imports_torch_and_little_more() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); from vqmoe_ds.moe import *; "
        "MoELayer(LayerConfig(16, MoEConfig(num_experts=4, expert_hidden=8)))(torch.ones(1, 4, 16)); "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert "vqmoe_ds.moe.layer" in found
    heavy = {"deepspeed", "matplotlib", "megatron", "transformers", "datasets", "tokenizers", "sympy", "sklearn"}
    assert not {name.partition(".")[0] for name in found} & heavy
    assert not [name for name in found if name.startswith(("torch._dynamo", "torch._inductor"))]

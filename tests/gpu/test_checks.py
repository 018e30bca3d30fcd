"""The checks of benchmarks/gpu.py that need no clock, as tests: ``make test-gpu``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_checks.report import BAD, CHECKS, Check

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

RIGHT = [check for check in CHECKS if check.module in ("grouped", "oracles", "syncs", "exact", "across")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One rank over NCCL, as a training sets it up."""
    from gpu_checks.frame import Bench

    from vqmoe_ds.runtime.ranks import find_place
    from vqmoe_ds.runtime.torch_setup import set_up_torch

    place = find_place()
    return Bench(set_up_torch(place), False, tmp_path_factory.mktemp("gpu"), place)


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.module)
def test_check(check: Check, bench: Any) -> None:
    findings = list(importlib.import_module(f"gpu_checks.{check.module}").run(bench))
    assert any(finding.status == "passed" for finding in findings)
    assert [f"{finding.case}: {finding.why}" for finding in findings if finding.status in BAD] == []

"""Imports are quick, and what they leave behind is as it was."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from vqmoe_ds.importing import quickly, uncompiled

SWITCH = "TORCHDYNAMO_DISABLE"


@pytest.mark.parametrize("looking", [True, False])
def test_the_collector_is_afterwards_as_it_was(looking):
    before = gc.isenabled()
    (gc.enable if looking else gc.disable)()
    try:
        with pytest.raises(ImportError), quickly():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == looking
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("before", [None, "0"])
def test_the_switch_of_the_compiler_is_afterwards_as_it_was(monkeypatch, before):
    monkeypatch.delenv(SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(SWITCH, before)
    with uncompiled():
        assert os.environ[SWITCH] == "1"
    assert os.environ.get(SWITCH) == before


def test_a_start_imports_neither_inductor_nor_what_it_needs():
    """They are a fifth of the seconds that a start costs; a new process, for this one has imported everything."""
    work = """
import sys
from vqmoe_ds.device import make_deterministic
make_deterministic(False)
assert "torch._dynamo" not in sys.modules
from vqmoe_ds.train.zero import import_optimizers
import_optimizers("AdamW")
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5 as muon
print(muon.__module__, hasattr(muon, "_torchdynamo_orig_callable"))
print([name for name in ("torch._inductor.compile_fx", "functorch.compile") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["deepspeed.runtime.zero.muon.original_muon False", "[]"]

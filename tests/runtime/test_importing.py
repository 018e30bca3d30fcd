"""Imports are quick, and what they leave behind is as it was."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from vqmoe_ds.runtime.importing import quickly, uncompiled


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


def test_the_compiler_is_afterwards_as_it_was():
    compiler = torch.compile
    with pytest.raises(ImportError), uncompiled():
        assert torch.compile(len) is len and torch.compile()(len) is len and torch.compile(dynamic=True)(len) is len
        raise ImportError
    assert torch.compile is compiler


def test_a_start_and_a_step_import_neither_dynamo_nor_inductor():
    """They are a third of the seconds that a start costs; a new process, for this one has imported everything."""
    work = """
import sys
import torch
from vqmoe_ds.runtime.device import make_deterministic
make_deterministic(False)
from vqmoe_ds.train.zero import import_optimizers
import_optimizers("AdamW")
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5 as muon
print(muon.__module__, hasattr(muon, "_torchdynamo_orig_callable"))
weight = torch.nn.Parameter(torch.ones(3))
for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
    optimizer = kind([weight], lr=0.1)
    weight.grad = torch.arange(3.0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
print([name for name in ("torch._dynamo", "torch._inductor", "sympy", "functorch.compile") if name in sys.modules])
print(weight.tolist(), weight.requires_grad, torch.is_grad_enabled())
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, imported, weight = done.stdout.splitlines()[-3:]
    assert (first, imported) == ("deepspeed.runtime.zero.muon.original_muon False", "[]")
    plain = torch.nn.Parameter(torch.ones(3))
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
        plain.grad = torch.arange(3.0)
        kind([plain], lr=0.1).step()
    assert weight == f"{plain.tolist()} True True"

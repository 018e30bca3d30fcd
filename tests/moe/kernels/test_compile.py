"""Every Triton kernel goes through Triton's real compiler for an H100, which the interpreter says nothing about.

No GPU is needed: a stand-in for the driver names the card, and launches stop after compilation. Triton must not have
been imported for its interpreter, so this runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqmoe_ds.moe.kernels.triton_support import triton

_SCRIPT = """
import collections, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from vqmoe_ds.models.loss import cross_entropy
from vqmoe_ds.models.rotary import rotate, rotate_qkv
from vqmoe_ds.moe.kernels import codes, combine, statistics, swiglu, triton_support

class Card:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

compiled, run = collections.Counter(), JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    code = run(self, *args, grid=grid, warmup=True, **kwargs)
    assert code.asm["cubin"]
    compiled[self.fn.__name__] += 1

driver.set_active(Card())
JITFunction.run = compile_only
triton_support._interpreted = True  # CPU tensors count as CUDA's
torch.manual_seed(0)

def backward(*outputs):
    sum(y.float().sum() for y in outputs).backward()

def draw(*shape):
    return torch.randn(*shape).to(dtype).requires_grad_()

order = torch.randperm(64)
for dtype in (torch.float32, torch.bfloat16):
    swiglu.swiglu(draw(8, 48), draw(8, 48))
    swiglu.swiglu_backward(draw(8, 48).detach(), draw(8, 48), draw(8, 48))
    backward(combine.combine_rows(draw(64, 48), order, order.argsort(), None, 1))
    backward(combine.combine_rows(draw(64, 5000), order, order.argsort(), torch.rand(32, 2), 2))
    rows = combine.expand_rows(draw(32, 48), order, order.argsort(), 2)
    backward(combine.combine_rows(rows, order, order.argsort(), torch.rand(32, 2).requires_grad_(), 2))
    cos, sin = torch.rand(4, 24), torch.rand(4, 24)
    backward(*rotate(draw(2, 4, 3, 48), draw(2, 4, 3, 48), cos, sin))
    backward(*rotate_qkv(draw(2, 4, 9, 48), cos, sin, 3))
    backward(*rotate_qkv(draw(2, 4, 8, 48), cos, sin, 2))
    backward(cross_entropy(draw(8, 9999), torch.arange(8)))
ids = codes.nearest_codes(torch.randn(200, 48), torch.randn(2, 33, 48))
codes.mix_context(torch.randn(2, 9, 48).bfloat16(), 3, 0.5)
codes.mix_context(torch.randn(2, 9, 48), 3, 0.5, torch.zeros(2, 9, dtype=torch.int64))
codes.mix_context(torch.randn(2, 9, 48), 4096, 0.5)  # written out it would not end
statistics.sum_by_code(torch.randn(200, 48), ids, 33)
moments = torch.zeros(2, 33, 49, dtype=torch.float64)
statistics.add_by_code(moments, torch.randn(200, 48), ids)
statistics.follow_means(*torch.randn(2, 2, 33, 48), torch.rand(2, 33), moments, 0.9)
print(*sorted(compiled))
"""


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_for_an_h100(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    kernels = {"_forward_kernel", "_backward_kernel", "_gather_kernel", "_spread_kernel", "_turn_kernel"}
    kernels |= {"_loss_kernel", "_gradient_kernel", "_nearest_codes", "_sum_by_code", "_mix_context"}
    kernels |= {"_count_kinds", "_place_rows", "_follow"}
    assert kernels <= set(done.stdout.split())

"""What the parts of a training step cannot do without: each alone, by the fastest means there is on this machine.

Products and attention are timed as the model calls them, with nothing around them; what only moves memory is reckoned
from the bandwidth of a large copy, bytes read plus bytes written. All ranks measure at the same time, for they share
the machine's memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import seconds
from peers import copy_bandwidth
from torch import Tensor, nn

from vqmoe_ds.models.linear import Linear
from vqmoe_ds.models.transformer import DenseMLP, RMSNorm

ADAM_BYTES = 28  # a weight: read gradient, master and both moments, write master and both moments, in float32
REPEATS = 8


def floors(options: argparse.Namespace, ranks: int, parameters: int) -> dict[str, float]:
    """Milliseconds of each part of one step on this rank.

    Args:
        options: of benchmarks/step.py.
        ranks: that share the tokens.
        parameters: this rank's optimizer updates.
    """
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    tokens, width, layers = options.tokens // ranks, options.width, options.layers
    shape = (tokens // options.sequence, options.sequence, width)
    bandwidth = copy_bandwidth()
    local = options.experts // ranks
    # Three weights, each read forward and backward, and its gradient written.
    expert_bytes = 3 * 3 * local * width * options.hidden * dtype.itemsize
    row_bytes = tokens * width * dtype.itemsize

    def step_of(module: nn.Module) -> float:
        module, x_BSD = module.to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
        direction = torch.randn_like(module(x_BSD))
        return _best(lambda: module(x_BSD).backward(direction))

    return {
        "attention": layers * step_of(_Attention(width)),
        "norms and residuals": layers * 2 * step_of(_Residual(width)),
        "experts": layers * (step_of(DenseMLP(width, options.hidden)) + expert_bytes / bandwidth * 1e3),
        "dispatch": layers * 4 * 2 * row_bytes / bandwidth * 1e3,  # two gathers forward, two backward
        "all-to-all": layers * 4 * _exchange(tokens, width, dtype) if ranks > 1 else 0.0,
        "embedding, head, loss": step_of(_Ends(width)),
        "optimizer and ZeRO": ADAM_BYTES * parameters / bandwidth * 1e3,
    }


class _Attention(nn.Module):
    """The two projections and the fused kernel; no norms, no positions."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = Linear(width, 3 * width), Linear(width, width), heads

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x_BSD).chunk(3, dim=2))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class _Residual(nn.Module):
    """A norm, and the sum with what it was made of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.norm(x_BSD)


class _Ends(nn.Module):
    """Head and loss over bytes; the embedding is a copy of a few rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = Linear(width, 256)

    def forward(self, x_BSD: Tensor) -> Tensor:
        targets_T = torch.zeros(x_BSD.shape[0] * x_BSD.shape[1], dtype=torch.int64)
        return F.cross_entropy(self.head(x_BSD).float().flatten(0, 1), targets_T)


def _exchange(tokens: int, width: int, dtype: torch.dtype) -> float:
    rows, out = torch.randn(tokens, width).to(dtype), torch.empty(tokens, width, dtype=dtype)
    return _best(lambda: dist.all_to_all_single(out, rows))


def _best(call: Callable[[], object]) -> float:
    """Milliseconds of the fastest of a few calls, which all ranks make together."""
    times = []
    for _ in range(REPEATS):
        if dist.is_initialized():
            dist.barrier()
        times.append(seconds(call))
    return min(times) * 1e3

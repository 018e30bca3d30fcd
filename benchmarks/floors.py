"""Least times of the parts of a training step: each alone, by the fastest means there is on this machine.

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

from vqmoe_ds.models.block import RMSNorm
from vqmoe_ds.moe.linear import Linear
from vqmoe_ds.moe.mlp import DenseMLP

ADAM_BYTES = 28  # a weight: read gradient, master and both moments, write master and both moments, in float32
REPEATS = 2  # of each part, each time they are measured


class Floors:
    """The parts of one step on this rank; ``measure`` between steps, so that both meet the same machine.

    Args:
        options: of benchmarks/step.py.
        ranks: that share the tokens.
        parameters: held by this rank; its optimizer updates fewer on several ranks, where ZeRO-2 shares dense weights.
    """

    def __init__(self, options: argparse.Namespace, ranks: int, parameters: int) -> None:
        self.dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        self.layers, self.tokens, self.width = options.layers, options.tokens // ranks, options.width
        self.shape = (self.tokens // options.sequence, options.sequence, options.width)
        self.parameters = parameters
        # Three weights of an expert, each read forward and backward, and its gradient written.
        self.expert_bytes = 9 * options.experts // ranks * options.width * options.hidden * self.dtype.itemsize
        modules = {"attention": _Attention, "norms and residuals": _Residual, "embedding, head, loss": _Ends}
        self.parts: dict[str, Callable[[], object]] = {
            name: self._step_of(module(options.width)) for name, module in modules.items()
        }
        self.parts["experts"] = self._step_of(DenseMLP(options.width, options.hidden))
        if ranks > 1:
            rows = torch.randn(self.tokens, options.width).to(self.dtype)
            self.parts["all-to-all"] = lambda: dist.all_to_all_single(torch.empty_like(rows), rows)
        self.best = dict.fromkeys(self.parts, float("inf"))
        self.bandwidth = 0.0

    def measure(self) -> None:
        """Time every part; all ranks together."""
        for name, call in self.parts.items():
            for _ in range(REPEATS):
                if dist.is_initialized():
                    dist.barrier()
                self.best[name] = min(self.best[name], seconds(call) * 1e3)
        self.bandwidth = max(self.bandwidth, copy_bandwidth())

    def milliseconds(self) -> dict[str, float]:
        """The least of each part of a step that was measured."""
        best, row_bytes = self.best, self.tokens * self.width * self.dtype.itemsize
        return {
            "attention": self.layers * best["attention"],
            "norms and residuals": self.layers * 2 * best["norms and residuals"],
            "experts": self.layers * (best["experts"] + self.expert_bytes / self.bandwidth * 1e3),
            "dispatch": self.layers * 4 * 2 * row_bytes / self.bandwidth * 1e3,  # two gathers forward, two backward
            "all-to-all": self.layers * 4 * best.get("all-to-all", 0.0),
            "embedding, head, loss": best["embedding, head, loss"],
            "optimizer and ZeRO": ADAM_BYTES * self.parameters / self.bandwidth * 1e3,
        }

    def _step_of(self, module: nn.Module) -> Callable[[], None]:
        """Forward and backward of one module."""
        module, x_BSD = module.to(self.dtype), torch.randn(self.shape, dtype=self.dtype, requires_grad=True)
        direction = torch.randn_like(module(x_BSD))
        return lambda: module(x_BSD).backward(direction)


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

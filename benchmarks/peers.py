"""Layers to measure ours against: the same SwiGLU experts inside each of DeepSpeed's MoE layers, and the dense MLP.

Every layer maps hidden states ``[B, S, D]`` to ``[B, S, D]`` with one expert of hidden width H per token.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from measuring import seconds
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.mlp import DenseMLP
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.runtime.torch_setup import build_no_shared_memory_op

PEERS = ("deepspeed MoE, drops", "deepspeed MoE, dropless", "deepspeed AutoEP")


def join_group(rank: int = 0, world: int = 1, port: int | None = None) -> None:
    """Start gloo without DeepSpeed's shared-memory extension, which would be compiled first."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port or free_port()}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    build_no_shared_memory_op()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class NativeMoE(nn.Module):
    """``deepspeed.moe.layer.MoE``, top-1, without random token selection."""

    def __init__(self, width: int, hidden: int, experts: int, drop: bool, ep_size: int = 1) -> None:
        super().__init__()
        self.moe = MoE(
            width,
            expert=DenseMLP(width, hidden),
            num_experts=experts,
            ep_size=ep_size,
            k=1,
            capacity_factor=1.25,
            drop_tokens=drop,
            use_rts=False,
        )

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        y_BSD, aux_loss, _ = self.moe(x_BSD)
        return y_BSD, aux_loss


class OurLayer(nn.Module):
    """``MoELayer`` with the discrete path only; codes are looked up in the layer's own input."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        moe = MoEConfig(router="vq", num_experts=experts, expert_hidden=hidden, top_k=0)
        # As in most of a training: no samples for an initialization are kept.
        book = CodebookConfig(source=CodeSource.LAYER_STATE, init_step=1_000_000)
        self.layer = MoELayer(LayerConfig(width, moe, codebook=book, shared_codebook=True))
        self.bank = CodebookBank(book, 1, experts, width, seed=0)
        # As long as the vectors they are compared with, as learned codes are; else the shortest would win most tokens.
        self.bank.codes_LKC.copy_(F.rms_norm(self.bank.codes_LKC, (width,)))

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD: Tensor = self.layer(x_BSD, RoutingContext(codebooks=self.bank))[0]
        self.bank.clear_statistics()
        return y_BSD


def auto_ep(width: int, hidden: int, experts: int, ep_size: int = 1, ep_rank: int = 0) -> AutoEPMoELayer:
    """DeepSpeed's AutoEP layer, top-1, ``torch._grouped_mm``, as it would replace a Hugging Face block."""
    source = nn.Module()
    source.gate = nn.Linear(width, experts, bias=False)
    source.experts = nn.ModuleList(DenseMLP(width, hidden) for _ in range(experts))
    spec = MoELayerSpec(
        moe_module_name="mlp",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="module_list",
        expert_w1_name="gate",
        expert_w2_name="down",
        expert_w3_name="up",
        num_experts=experts,
        top_k=1,
        hidden_size=width,
        ffn_hidden_size=hidden,
        score_func="softmax",
        score_apply="post",
        route_norm=False,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    return AutoEPMoELayer(spec, source, ep_size, ep_rank, AutoEPConfig(enabled=True, autoep_size=ep_size))


class WithoutAux(nn.Module):
    """Only the output of a layer that may return more: our block wants one tensor of a foreign layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BSD: Tensor) -> Tensor:
        y = self.inner(x_BSD)
        return y[0] if isinstance(y, tuple) else y


def build_layer(name: str, width: int, hidden: int, experts: int) -> nn.Module:
    """A layer by the name it has in the tables."""
    builders: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: DenseMLP(width, hidden),
        "ours": lambda: OurLayer(width, hidden, experts),
        PEERS[0]: lambda: NativeMoE(width, hidden, experts, drop=True),
        PEERS[1]: lambda: NativeMoE(width, hidden, experts, drop=False),
        PEERS[2]: lambda: auto_ep(width, hidden, experts),
    }
    torch.manual_seed(0)
    layer = builders[name]()
    for module in layer.modules():
        if isinstance(module, MoE | AutoEPMoELayer):
            module.set_deepspeed_parallelism()
    return layer


class _Undrawn(TorchFunctionMode):
    """Random initial values are left out: on the CPU they take minutes for layers of the size of a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs.get("tensor", args[0] if args else None)
        if func is torch.randn:
            return torch.empty(*args, **{name: value for name, value in kwargs.items() if name != "generator"})
        return func(*args, **kwargs)


@torch.no_grad()
def build_on(device: torch.device, dtype: torch.dtype, build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module built and drawn on the device: matrices normal, of 1 / sqrt(fan in), and codes of unit features.

    Parameters are cast to ``dtype``; buffers stay as they are, as under DeepSpeed's bf16.
    """
    with torch.device(device), _Undrawn():
        module = build()
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    for bank in (part for part in module.modules() if isinstance(part, CodebookBank)):
        bank.codes_LKC.normal_()
        bank.ema_sum_LKC.copy_(bank.codes_LKC)
    return module


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes per second read plus written by a large copy, best of 5."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(6))
    return 2 * source.nbytes / best

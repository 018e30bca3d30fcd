"""Gradients under expert parallelism, where ranks share some weights and hold others alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqmoe_ds.moe.communication import comm
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.runtime.errors import ConfigError


@torch.no_grad()
def sync_gradients(model: nn.Module, group: Any = None, replicas: Any = None) -> None:
    """Average gradients: those of an expert over the ranks that hold it, all others over all ranks.

    It takes the place of ``DistributedDataParallel``, to be called after the backward pass of an optimizer step; every
    rank's loss is the mean over its own tokens. On one rank it changes nothing:

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, sync_gradients
        >>> layer = MoELayer(LayerConfig(width=16, moe=MoEConfig(router="topk", num_experts=4)))
        >>> layer(torch.randn(2, 8, 16))[0].sum().backward()
        >>> sync_gradients(layer)

    A weight without a gradient counts as zero, since another rank may have one. The backward pass of the all-to-all has
    summed an expert's gradient over its expert-parallel group already; what is left is the sum over ``replicas``, and
    the division by the number of all ranks.

    Args:
        model: its gradients are overwritten.
        group: ranks that see different tokens (None: the default group).
        replicas: the ranks of ``group`` that hold the same experts; None where no two do.

    Raises:
        ConfigError: ``replicas`` and the ranks that share the experts do not make up ``group``, or FSDP2 shards the
            model.
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if world == 1:
        return
    # A DTensor by what it has: its import takes seconds.
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ConfigError("sync_gradients: FSDP2 shards the model and averages gradients by itself; leave the call out")
    copies = 1 if replicas is None else dist.get_world_size(replicas)
    spread = _experts(layer for layer in _layers(model) if layer.ep_size > 1)
    for layer in _layers(model):
        if layer.ep_size > 1 and layer.ep_size * copies != world:
            raise ConfigError(
                f"sync_gradients: ep_size={layer.ep_size} times {copies} replica(s) of the experts is not the "
                f"{world} ranks of the group; give replicas, the group of the ranks that hold the same experts"
            )
    works = []
    for parameter in model.parameters():
        # Every rank walks the same parameters in the same order: collectives are matched by order alone.
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(world)
        alone = id(parameter) in spread
        if not alone or replicas is not None:
            works.append(dist.all_reduce(parameter.grad, group=replicas if alone else group, async_op=True))
    for work in works:
        work.wait()


@torch.no_grad()
def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale gradients to a norm of at most ``limit``, experts of all ranks included; returns the norm before, float32.

    ``torch.nn.utils.clip_grad_norm_`` sees one rank's experts alone. The norm stays on the device.

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, clip_gradients
        >>> layer = MoELayer(LayerConfig(width=16, moe=MoEConfig(router="topk", num_experts=4)))
        >>> layer(torch.randn(2, 8, 16))[0].sum().backward()
        >>> norms = [clip_gradients(layer, 0.5).item() for _ in range(2)]
        >>> norms[0] > 0.5, round(norms[1], 4)
        (True, 0.5)
    """
    norm, gradients = gradient_norm(model)
    # As torch.nn.utils.clip_grad_norm_ has it, without a branch: the host would wait for the norm.
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm


@torch.no_grad()
def gradient_norm(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The norm of all gradients, experts of all ranks included, float32 on the device; and this rank's gradients."""
    # Of layers that share their experts out alone: those of others are equal on all ranks, and count once.
    spread = [layer for layer in _layers(model) if layer.ep_size > 1]
    experts = _experts(spread)
    gradients: dict[bool, list[Tensor]] = {False: [], True: []}
    for param in model.parameters():
        if param.grad is not None:
            gradients[id(param) in experts].append(param.grad)
    zero = torch.zeros((), dtype=torch.float32, device=next(model.parameters()).device)
    # In float32, for in fp16 the square of 256 is infinite.
    squares = {key: sum((g.float().square().sum() for g in some), zero) for key, some in gradients.items()}
    # Dense gradients are equal on all ranks by now, those of experts within a group are of different experts.
    if spread:
        comm().all_reduce(squares[True], group=spread[0].exchange_group)
    return (squares[False] + squares[True]).sqrt(), gradients[False] + gradients[True]


def _layers(model: nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def _experts(layers: Any) -> set[int]:
    """Identities of the experts' weights."""
    return {id(parameter) for layer in layers for parameter in layer.experts.parameters()}

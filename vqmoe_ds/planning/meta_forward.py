"""One forward pass of the real model on meta tensors: shapes run through the real code, and what autograd would keep.

Routes decide how many rows each rank gets, and meta tensors have no values: ``even_plans`` stands in for the counts,
every rank sends and receives its even share. Experts take the grouped path of GPUs; ``GPU_KERNELS`` stands in for what
PyTorch would compute otherwise there.

Legend: L layers, T tokens, R routed rows per token, M = T * R rows here, P rows received, N experts, E local experts.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed.comm as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call

from vqmoe_ds.config.schema import ModelConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.dispatch import DispatchPlan, Exchange, SortedRows

OUTSIDE = "outside"
"""Section of what no block keeps: embedding, head and loss."""


def even_plans(
    imbalance: float, experts: int, rows: SortedRows, group: Any = None, local: slice = slice(None)
) -> list[DispatchPlan]:
    """Plans in which ``experts`` local experts receive ``imbalance`` times their even share.

    Stands in for ``plans_of``, whose ``local`` tells which experts of ``rows`` are here: here only their number counts.
    """
    here, ranks = rows.order_LM.shape[1], dist.get_world_size(group=group) if group is not None else 1
    received = round(here * imbalance)
    counts_GE = torch.empty(ranks, experts, dtype=torch.int32, device="meta")
    exchange = None
    if ranks > 1 or received != here:
        exchange = Exchange(lambda: (_split(here, ranks), _split(received, ranks)), counts_GE)
    ends_E = counts_GE.sum(0).int()
    layers = zip(rows.order_LM, rows.inverse_LM, rows.ends_LN, strict=True)
    return [DispatchPlan(rows.routes, order, inverse, ends, ends_E, exchange) for order, inverse, ends in layers]


def _split(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def received_rows(rows: Tensor, send: list[int], receive: list[int], group: Any, works: Any = None) -> Tensor:
    """A tensor of the shape that an all-to-all returns."""
    return rows.new_empty(sum(receive), rows.shape[1])


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = True, enable_gqa: bool = False
) -> Tensor:
    """The kernel that PyTorch takes on real devices; on meta it would take the one that keeps S x S scores.

    The mask, one for all blocks, is counted elsewhere (``memory.attention_mask``).
    """
    y: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    return y


class _FusedNorm(torch.autograd.Function):
    """A norm that keeps what the GPUs' kernel keeps; on meta PyTorch takes the formula, which keeps float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


def fused_norm(x: Tensor, shape: torch.Size, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Stands in for ``F.rms_norm``; codebooks norm without gradient and without weight."""
    if weight is None:
        return torch.empty_like(x)
    y: Tensor = _FusedNorm.apply(x, weight)
    return y


GPU_KERNELS: dict[str, Any] = {
    "torch.nn.functional.rms_norm": fused_norm,
    "torch.nn.functional.scaled_dot_product_attention": fused_attention,
}


def cast_weights(model: MoETransformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by name, in the type the engine casts them to."""
    return {name: param.detach().to(dtype).requires_grad_() for name, param in model.named_parameters()}


def run(model: MoETransformer, weights: dict[str, Tensor], batch: int, imbalance: float = 1.0) -> Tensor:
    """The training loss (a meta scalar) of ``batch`` sequences of ``model.sequence_length`` tokens, or images.

    Args:
        model: on the meta device; left in evaluation mode, in which codebooks gather no statistics.
        weights: ``cast_weights`` of it.
        batch: sequences B.
        imbalance: rows a rank's experts receive, relative to the mean.
    """
    model.eval()
    layers = model.moe_layers()
    plans = functools.partial(even_plans, imbalance, layers[0].num_local_experts if layers else 0)
    stand_ins: dict[str, Any] = {
        # In both places: moe/layer.py has imported it by name.
        "vqmoe_ds.moe.dispatch.plans_of": plans,
        "vqmoe_ds.moe.layer.plans_of": plans,
        "vqmoe_ds.moe.mirror.HostMirror.read": lambda mirror, tensor: 0,  # counters of routers, as at the first step
        **GPU_KERNELS,
    }
    if layers and layers[0].exchange_group is None:  # no peers to ask
        stand_ins["vqmoe_ds.moe.dispatch._all_to_all"] = received_rows
    known = {"source.table_ready": torch.ones((), dtype=torch.bool)} if model.source is not None else {}  # read on host
    with ExitStack() as stack, torch.device("meta"):
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch(name, stand_in))
        loss, aux_loss = functional_call(model, {**weights, **known}, _inputs(model.config.model, batch))
        total: Tensor = loss + aux_loss
        return total


def _inputs(config: ModelConfig, batch: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch: tokens and tokens, or images and labels."""
    if config.image_size:
        shape = (batch, config.image_size, config.image_size, config.channels)
        return torch.zeros(shape, dtype=torch.uint8), torch.zeros(batch, dtype=torch.int64)
    tokens_BS = torch.zeros(batch, config.sequence_length, dtype=torch.int64)
    return tokens_BS, tokens_BS


def kept_for_backward(model: MoETransformer, dtype: torch.dtype, imbalance: float = 1.0) -> tuple[list[int], int]:
    """Bytes that autograd keeps of one sequence: for every block, and outside of them; no weights."""
    weights = cast_weights(model, dtype)
    seen = {tensor.untyped_storage()._cdata: tensor for tensor in (*weights.values(), *model.buffers())}
    kept: Counter[str] = Counter()
    with _sections(model) as section:

        def pack(tensor: Tensor) -> Tensor:
            # Views share a storage, which counts once. On the meta device addresses are 0: the object tells them apart.
            key = tensor.untyped_storage()._cdata
            if key not in seen:
                kept[section[0]] += tensor.untyped_storage().nbytes()
                seen[key] = tensor  # alive, so that no other storage takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(model, weights, 1, imbalance)
    return [kept[str(index)] for index in range(len(model.blocks))], kept[OUTSIDE]


@contextmanager
def _sections(model: nn.Module) -> Iterator[list[str]]:
    """A one-element list with the block that is running."""
    section = [OUTSIDE]

    def entering(name: str) -> Any:
        def hook(*_: Any) -> None:
            section[0] = name

        return hook

    handles = []
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        handles.append(block.register_forward_pre_hook(entering(str(index))))
        handles.append(block.register_forward_hook(entering(OUTSIDE)))
    try:
        yield section
    finally:
        for handle in handles:
            handle.remove()

"""Codes in place of the learned gate of a native ``deepspeed.moe.layer.MoE``.

For models that are already built on DeepSpeed's own MoE layer (``vqmoe_ds.moe.layer`` is the better road for new ones:
no padding, ZeRO-3, resharding)::

    from deepspeed.moe.layer import MoE
    from vqmoe_ds.moe.state_sync import StateSync
    from vqmoe_ds.moe.deepspeed_gate import VQGate

    self.moe = MoE(width, expert=MLP(width), num_experts=16, ep_size=4)
    self.moe.deepspeed_moe.gate = VQGate(width, num_experts=16)
    ...
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    syncs = [StateSync(gate.bank, engine.gradient_accumulation_steps()) for gate in vq_gates(model)]
    for sync in syncs:
        sync.broadcast()
    ...
    output, aux_loss, counts = self.moe(hidden)   # add aux_loss to the loss, as with the stock gate
    ...
    engine.step()
    if at_optimizer_step:
        for sync in syncs:
            sync.step()

No name on the path to the MoE layer may contain "expert": DeepSpeed's checkpoint drops such keys in silence.

Legend: T tokens, D width, N experts, R routed rows per token, M = T * R rows.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor, nn

from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.dispatch import make_plans
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.routers.vq import VQRouter
from vqmoe_ds.runtime.errors import ConfigError


class VQGate(nn.Module):
    """A gate for ``MOELayer`` with the routing of ``VQRouter``: nearest code, and an optional linear router beside it.

    No token is dropped: the capacity is the largest load of any expert, over the expert-parallel group.

    Args:
        width: model width D.
        num_experts: experts N of the layer over all ranks.
        moe: ``top_k`` and loss weights of the linear router; by default the discrete path alone. ``num_experts`` and
            ``expert_hidden`` are not read.
        book: codebook options; the gate sees nothing but the layer's input, so ``source`` must be layer_state.
        seed: of the random codes; the same on every rank.

    Raises:
        ConfigError: an option that a gate cannot honour.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        moe: MoEConfig | None = None,
        book: CodebookConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        moe = moe or MoEConfig(top_k=0)
        book = book or CodebookConfig(source=CodeSource.LAYER_STATE)
        if book.source is not CodeSource.LAYER_STATE:
            raise ConfigError(
                f"VQGate sees only the layer's input, so codebook.source={book.source.value} cannot work; "
                "use codebook.source=layer_state"
            )
        if moe.code_blend:
            raise ConfigError("a gate cannot change what experts see, so moe.code_blend must be 0 with VQGate")
        if moe.input_norm or moe.output_norm:
            raise ConfigError(
                "a gate cannot normalise what experts see and give, so moe.input_norm and moe.output_norm must be "
                "false with VQGate"
            )
        moe = MoEConfig(**{**moe.model_dump(), "num_experts": num_experts})
        self.num_experts = num_experts
        self.router = VQRouter(LayerConfig(width, moe, codebook=book, shared_codebook=True))
        self.bank = CodebookBank(book, 1, num_experts, width, seed)
        self.ep_group: Any = None

    def _set_ep_group(self, ep_group: Any) -> None:
        """Called by ``MOELayer`` when the engine has made its groups."""
        # Without the assertion of DeepSpeed's gate that this happens once: a model may be initialised again.
        self.ep_group = ep_group

    def forward(
        self, x_TD: Tensor, used_token: Tensor | None = None, sparse_routes: bool = True, use_tutel: bool = False
    ) -> tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor, Tensor]:
        """The contract of DeepSpeed 0.19.4 and later.

        Returns:
            auxiliary loss; capacity C; N; int32 ``[R, T]`` experts; int32 ``[R, T]`` places in their buffers of C rows;
            float32 ``[R, T]`` weights; int64 ``[N]`` rows of each expert.
        """
        if used_token is not None or not sparse_routes:
            raise ValueError("VQGate routes every token by indices: used_token and dense masks are not supported")
        routing = self.router(x_TD, RoutingContext(codebooks=self.bank))
        ids_TR = routing.expert_ids_TR
        weights_TR = routing.weights_TR
        if weights_TR is None:
            weights_TR = torch.ones(ids_TR.shape, device=x_TD.device)
        # Without a group: MOELayer exchanges the rows itself, in buffers of C rows for each expert.
        plan = make_plans(ids_TR.unsqueeze(0), self.num_experts)[0]
        counts_N = plan.sent_counts_N.long()
        starts_N = plan.sent_ends_N - counts_N
        places_TR = (plan.inverse_M - starts_N[ids_TR.flatten()]).view_as(ids_TR)
        capacity = counts_N.max().clamp_min(1)
        # The buffers travel in equal parts: ranks that differ in C hang in DeepSpeed's all-to-all.
        if self.ep_group is not None and dist.get_world_size(group=self.ep_group) > 1:
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        return (
            routing.aux_loss,
            capacity,
            self.num_experts,
            ids_TR.t().contiguous().int(),
            places_TR.t().contiguous().int(),
            weights_TR.float().t().contiguous(),
            counts_N,
        )


def vq_gates(model: nn.Module) -> list[VQGate]:
    """All gates of a model, in the order of its modules: the same on every rank."""
    return [module for module in model.modules() if isinstance(module, VQGate)]

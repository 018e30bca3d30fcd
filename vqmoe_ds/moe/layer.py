"""The MoE layer: router -> dispatcher -> experts -> weighted sum.

Legend: B batch, S sequence, T = B * S tokens, D width, N experts, E local experts, R routed rows per token.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.dispatch import (
    Ahead,
    DispatchPlan,
    combine,
    expand_rows,
    merge_rows,
    plans_of,
    return_rows,
    send_rows,
    send_rows_during,
    sort_rows,
)
from vqmoe_ds.moe.experts import StackedExperts
from vqmoe_ds.moe.mlp import SharedExperts
from vqmoe_ds.moe.routers import Routing, RoutingContext, build_router
from vqmoe_ds.moe.state import KeepsPrecision, recomputing
from vqmoe_ds.runtime.errors import ConfigError


class MoELayer(KeepsPrecision):
    """Sparse SwiGLU experts under any registered router.

    In place of a block's MLP, in any training loop:

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer
        >>> moe = MoEConfig(router="topk", num_experts=4, expert_hidden=32, top_k=2)
        >>> layer = MoELayer(LayerConfig(width=16, moe=moe))
        >>> y_BSD, aux_loss, expert_ids_TR = layer(torch.randn(2, 8, 16))
        >>> y_BSD.shape, expert_ids_TR.shape
        (torch.Size([2, 8, 16]), torch.Size([16, 2]))

    Args:
        config: width, experts, router and layout.
        group: process group of the ``config.ep_size`` ranks that share the experts; may be bound later.

    Raises:
        ConfigError: contradictions in ``config``, or a group that does not fit its layout.
    """

    tokens_per_expert: Tensor
    """Rows that each of the N experts got from this rank in training, float64 ``[N]``; whoever reads it may zero it."""

    experts_class: ClassVar[type[StackedExperts]] = StackedExperts
    """What holds this rank's experts."""
    notes_experts: ClassVar[bool] = True
    """Whether a ``state_dict`` notes which experts it has."""

    def __init__(self, config: LayerConfig, group: Any = None) -> None:
        # Not super(): in DeepSpeedMoELayer the next constructor is DeepSpeed's, which copies a Hugging Face block.
        nn.Module.__init__(self)
        self.config, self.layer = config, config.layer
        self.ep_size, self.ep_rank, self.ep_group = config.ep_size, config.ep_rank, None
        self.num_experts = config.moe.num_experts
        self.num_local_experts = self.num_experts // self.ep_size
        self.experts = self.experts_class(
            width=config.width,
            hidden=config.moe.expert_hidden,
            num_local=self.num_local_experts,
            first_expert=self.ep_rank * self.num_local_experts,
            layer=config.layer,
            seed=config.seed,
            std=config.width**-0.5,
            out_scale=config.out_scale,
        )
        self.shared = SharedExperts(config) if config.moe.shared_experts else None
        self.router = build_router(config)
        # float64 holds counts exactly, float32 up to 2^24 only.
        self.register_buffer("tokens_per_expert", torch.zeros(self.num_experts, dtype=torch.float64), persistent=False)
        if group is not None:
            self.bind(group)

    def bind(self, group: Any) -> None:
        """Exchange rows within a process group from now on.

        Raises:
            ConfigError: it has another number of ranks, or another order, than the experts were dealt out for.
        """
        ranks, place = dist.get_world_size(group), dist.get_rank(group)
        if (ranks, place) != (self.ep_size, self.ep_rank):
            raise ConfigError(
                f"the layer was built with ep_size={self.ep_size} and ep_rank={self.ep_rank}, but this rank is number "
                f"{place} of a group of {ranks}; build it with ep_size={ranks} and ep_rank={place}"
            )
        self.ep_group = group

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the process group, which no other process knows; ``bind`` gives a new one."""
        return self.__dict__ | {"ep_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that exchanges rows within the same process group."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.ep_group = self.ep_group
        return twin

    @property
    def held(self) -> tuple[int, int]:
        """The first of the experts that this rank holds, and their number."""
        return self.ep_rank * self.num_local_experts, self.num_local_experts

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the tensors and not among them: files of every version have the same keys.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if self.notes_experts and metadata is not None:
            metadata["experts"] = self.held

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        first, count = local_metadata.get("experts", self.held)
        found = state_dict.get(f"{prefix}experts.w1")
        # Other tensors of another number took the place of those that were noted: experts put together, or cut.
        if (first, count) != self.held and found is not None and len(found) == count == self.num_local_experts:
            raise ConfigError(
                f"{prefix}experts: the state has the experts {first} to {first + count - 1}, and this rank holds "
                f"{self.held[0]} to {sum(self.held) - 1}: load what a rank with ep_size={self.ep_size} and "
                f"ep_rank={self.ep_rank} saved (or dict(state), which forgets whose it was)"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    @property
    def exchange_group(self) -> Any:
        """Group of the all-to-all, or None where rows stay at home."""
        if self.ep_size == 1:
            return None
        if self.ep_group is None:
            raise ConfigError(
                f"the layer shares its experts with {self.ep_size - 1} other rank(s) and has no process group: give "
                "MoELayer(config, group), call bind(group), or let DeepSpeed's engine bind it"
            )
        return self.ep_group

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(
            self, x_BSD: Tensor, context: RoutingContext | None = None, ahead: Ahead | None = None
        ) -> tuple[Tensor, Tensor, Tensor]: ...

    def forward(
        self, x_BSD: Tensor, context: RoutingContext | None = None, ahead: Ahead | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs ``[B, S, D]``, the auxiliary loss (scalar float32) and the chosen experts, int64 ``[T, R]``.

        Args:
            x_BSD: normalised hidden states.
            context: what else the router may know of these tokens.
            ahead: what is known of the dispatch before these states are.

        Raises:
            ConfigError: inputs of another width; experts of other ranks without a process group, under DDP or FSDP2.
        """
        if x_BSD.dim() < 2 or x_BSD.shape[-1] != self.config.width:
            raise ConfigError(
                f"the layer takes states [B, S, D] with D = {self.config.width}, its LayerConfig.width, and was given "
                f"{list(x_BSD.shape)}"
            )
        if self.ep_size > 1:
            self._refuse_wrappers()
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        ahead = ahead or Ahead()
        routing = self.router(x_TD, replace(context or RoutingContext(), sequence=x_BSD.shape[-2]))
        plan = self._plan(routing, ahead)
        # A recomputation sees the same tokens again, and each counts once.
        if self.training and not recomputing():
            self.tokens_per_expert += plan.sent_counts_N
        group, kept = self.exchange_group, ahead.kept
        rows_MD, shared, shared_TD = _rows(x_TD, routing, plan), self.shared, None
        if shared is None:
            sent_PD = send_rows(rows_MD, plan, group, kept)
        else:
            sent_PD, shared_TD = send_rows_during(lambda: shared(x_TD), rows_MD, plan, group, kept)
        # Experts run without rows too, so that every rank has the same collectives and the same gradients to reduce.
        rows_PD = self.experts(sent_PD, plan.ends_E)
        # The product with weights, LayerNorm and the product of slots save for backward the rows that came back.
        asked_again = routing.weights_TR is not None or routing.output_norm is not None or routing.slots is not None
        y_TD = _gathered(return_rows(rows_PD, plan, group, kept, asked_again), x_TD, routing, plan)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        aux_loss = x_TD.new_zeros((), dtype=torch.float32) if routing.aux_loss is None else routing.aux_loss
        return y_TD.view_as(x_BSD), aux_loss, self.router.experts_of_tokens(routing, len(x_TD))

    def _refuse_wrappers(self) -> None:
        """Nothing may average this rank's experts with those of the ranks that it shares them with."""
        # Private to PyTorch, but no module is told that it was wrapped.
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is not None and any(p is self.experts.w1 for p in ddp._module_parameters):
            wrapper, ranks = "DistributedDataParallel", dist.get_process_group_ranks(ddp.process_group)
        elif self.experts.mesh is not None:
            wrapper, ranks = "fully_shard", self.experts.mesh.mesh.flatten().tolist()
        else:
            return
        if set(ranks) & set(dist.get_process_group_ranks(self.exchange_group)) != {dist.get_rank()}:
            raise ConfigError(
                f"ep_size={self.ep_size} gives each rank experts of its own, and {wrapper} would mix them with those "
                "of other ranks: leave it out, and call vqmoe_ds.moe.sync_gradients(model, replicas=...) after backward"
            )

    def _plan(self, routing: Routing, ahead: Ahead) -> DispatchPlan:
        """The plan that is known ahead or kept from the first forward; else made here, from what is sorted ahead."""
        kept = ahead.kept
        if ahead.plan is not None:
            return ahead.plan
        # Made again, the plan would exchange counts once more, and the host would wait for them in backward.
        if kept is not None and kept.plan is not None and recomputing():
            return kept.plan
        ids_LTR = routing.expert_ids_TR.unsqueeze(0)
        if routing.last_is_discrete:
            discrete = ahead.rows or sort_rows(ids_LTR[..., -1:], self.num_experts)
            rows = merge_rows(sort_rows(ids_LTR[..., :-1], self.num_experts), discrete)
        else:
            rows = sort_rows(ids_LTR, self.num_experts)
        plan = plans_of(rows, self.exchange_group)[0]
        if kept is not None:
            kept.plan = plan
        return plan


def _rows(x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """What the experts see, row by row in the order of the plan, ``[M, D]``."""
    if routing.slots is not None:
        x_TD = routing.slots.inputs_MD
    elif routing.tokens_M is not None:
        x_TD = x_TD.index_select(0, routing.tokens_M)
    rows_MD = expand_rows(x_TD, plan)
    if routing.discrete_offset_TD is not None:
        rows_MD = rows_MD + _offset_rows(routing.discrete_offset_TD, plan)
    return _normalize_last(rows_MD, plan) if routing.input_norm else rows_MD


def _gathered(rows_MD: Tensor, x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """The weighted sum of each token's rows as they come from the experts, ``[T, D]``."""
    if routing.output_norm == "all":
        rows_MD = F.layer_norm(rows_MD, rows_MD.shape[-1:])
    elif routing.output_norm == "last":
        rows_MD = _normalize_last(rows_MD, plan)
    y_TD = combine(rows_MD, plan, routing.weights_TR)
    if routing.slots is not None:
        return routing.slots.gather(y_TD)
    if routing.tokens_M is not None:  # sequential on CPU, PyTorch's deterministic kernel elsewhere
        return y_TD.new_zeros(x_TD.shape).index_add(0, routing.tokens_M, y_TD)
    return y_TD


def _offset_rows(offset_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """The offset of each sorted row: that of its token on the discrete (last) slot, zero elsewhere."""
    tokens_M = plan.order_M // plan.routes
    return torch.where(_last_slots(plan), offset_TD[tokens_M], offset_TD.new_zeros(()))


def _normalize_last(rows_MD: Tensor, plan: DispatchPlan) -> Tensor:
    """The sorted rows, those on the discrete (last) slot at zero mean and unit variance over their features."""
    # Of all rows, and chosen afterwards: to index by a mask, the host has to wait for the number of rows in it.
    normed_MD = F.layer_norm(rows_MD, rows_MD.shape[-1:])
    return normed_MD if plan.routes == 1 else torch.where(_last_slots(plan), normed_MD, rows_MD)


def _last_slots(plan: DispatchPlan) -> Tensor:
    """Which sorted rows stand on the last slot, bool ``[M, 1]``: by the contract of ``Routing.last_is_discrete`` the
    discrete choice."""
    return (plan.order_M % plan.routes == plan.routes - 1).unsqueeze(1)

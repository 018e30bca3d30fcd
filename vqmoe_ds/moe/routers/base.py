"""Base classes of routers: question and answer, state that moves once per step, and the usual losses.

Legend: T tokens, D width, N experts, R routed rows per token, k experts chosen, M routed rows; where rows are
mixtures, B sequences of C slots each, M = B C.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.fields import option
from vqmoe_ds.config.routers import RouterFacts, RouterOptions
from vqmoe_ds.config.schema import MoEConfig, SoftmaxOver
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.kernels.integers import count_ids
from vqmoe_ds.moe.kernels.statistics import sum_by_code
from vqmoe_ds.moe.mirror import HostMirror
from vqmoe_ds.moe.sequence import SequenceShare
from vqmoe_ds.moe.state import SteppedState, without_autocast
from vqmoe_ds.runtime.errors import ConfigError


@dataclass(frozen=True)
class RoutingContext:
    """Facts that a router may use beside the states of its tokens; None where nobody knows them.

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, RoutingContext
        >>> layer = MoELayer(LayerConfig(16, MoEConfig(router="hash_token", num_experts=4)))
        >>> context = RoutingContext(expert_ids_TR=torch.tensor([[3], [1], [0]]))
        >>> layer(torch.randn(1, 3, 16), context)[2].tolist()
        [[3], [1], [0]]

    All of it enters a block as an argument, so that the recomputation of activation checkpointing sees it again.
    """

    expert_ids_TR: Tensor | None = None
    """Experts of each token that are known ahead, from codes or a table, int64."""
    token_ids_T: Tensor | None = None
    """Ids of the tokens, int64."""
    previous_T: Tensor | None = None
    """First choice of the MoE layer before, int64."""
    sequence: int | None = None
    """Tokens of one sequence; filled in by the layer. None: all tokens are one sequence."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each sequence where they differ."""
    codebooks: CodebookBank | None = None
    """The codebooks of all layers of the model."""
    share: SequenceShare | None = None
    """The part of every sequence that these tokens are, where ranks share sequences."""
    mean_tokens: float | None = None
    """Tokens per rank that shares them, where these are more or fewer."""
    source_TD: Tensor | None = None
    """Vectors of ``codebook.source``, float32 without gradient, for a router without codes that reads them."""


@dataclass(frozen=True)
class Slots:
    """Routed rows that are mixtures of the tokens of their sequence; the slots of all sequences have the same experts.

    So experts may see something else than tokens, and what comes of it reaches tokens by any weights.
    """

    inputs_MD: Tensor
    """What the experts see, in the type of the states."""
    weights_BSC: Tensor
    """Weights by which each of the S tokens of a sequence gathers the outputs of its C slots, float32."""

    def gather(self, rows_MD: Tensor) -> Tensor:
        """Outputs of the experts -> those of the tokens, ``[T, D]``."""
        batch, _, slots = self.weights_BSC.shape
        return (self.weights_BSC.to(rows_MD.dtype) @ rows_MD.unflatten(0, (batch, slots))).flatten(0, 1)

    @property
    def strongest_T(self) -> Tensor:
        """The slot of its sequence that weighs most for each token, int64."""
        return self.weights_BSC.flatten(0, 1).argmax(dim=1)


@dataclass(frozen=True)
class Routing:
    """A router's answer.

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import Routing
        >>> probs_TN = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
        >>> Routing(*reversed(probs_TN.topk(2))).expert_ids_TR.tolist()
        [[0, 1], [2, 1]]

    With ``tokens_M`` a token may have any number of rows: ids and weights are ``[M, 1]``, and ``tokens_M`` says whose.
    With ``slots`` rows are no tokens: ids are ``[M, 1]``, and the weights those of the slots.
    """

    expert_ids_TR: Tensor
    """Experts of each token, int64 in ``[0, N)``."""
    weights_TR: Tensor | None = None
    """Weights of their outputs, float32; None: 1 everywhere."""
    aux_loss: Tensor | None = None
    """Scalar that is added to the loss."""
    tokens_M: Tensor | None = None
    slots: Slots | None = None
    last_is_discrete: bool = False
    """Whether the last of several rows is that of a code: it may be sorted ahead, and stands behind the others."""
    discrete_offset_TD: Tensor | None = None
    """Added to the input of the last row, without gradient: a straight-through expert sees ``x + c sg(v - x)``."""
    input_norm: bool = False
    """Whether the expert of the last row sees a LayerNorm of its input."""
    output_norm: Literal["last", "all"] | None = None
    """Which rows a LayerNorm follows the experts of: the last of each token, or all."""


def _checked(answer: Any, name: str, tokens: int) -> Routing:
    """An answer of the types and shapes of ``Routing``, for T tokens; nothing of it waits for a device.

    Raises:
        ConfigError: it is none; the router and what is wrong are named.
    """
    if not isinstance(answer, Routing):
        raise ConfigError(f"the {name} router answered {_kind(answer)}, and route() gives a Routing")
    ids, weights, loss, rows = answer.expert_ids_TR, answer.weights_TR, answer.aux_loss, tokens
    if answer.slots is not None:
        rows = len(answer.slots.inputs_MD)
    elif answer.tokens_M is not None:
        rows = len(answer.tokens_M)
    found = None
    if not _are_ids(ids, rows) or ids.dim() != 2 or not ids.shape[1]:
        found = f"expert ids {_kind(ids)}; give int64 [{rows}, R] with R of 1 or more"
    elif weights is not None and (weights.shape != ids.shape or not weights.is_floating_point()):
        found = f"weights {_kind(weights)}; give floats {list(ids.shape)}, as the ids have it, or None"
    elif loss is not None and (not isinstance(loss, Tensor) or loss.dim()):
        found = f"aux_loss {_kind(loss)}; give a tensor without dimensions, or None"
    if found is not None:
        raise ConfigError(f"the {name} router answered {found}")
    return answer


def _are_ids(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.int64 and value.shape[:1] == (rows,)


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class Router(RouterFacts, nn.Module):
    """A router of one MoE layer; subclasses implement ``route`` and are named by ``register_router``.

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig, Router, Routing
        >>> class OwnHalfRouter(Router):
        ...     def route(self, x_TD, context):
        ...         return Routing((x_TD[:, :1] > 0).long())
        >>> router = OwnHalfRouter(LayerConfig(2, MoEConfig(router="topk", num_experts=2)))
        >>> router(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).expert_ids_TR.tolist()
        [[1], [0]]

    Args:
        config: of its layer.
    """

    ran = False
    """Whether there ever was a forward pass in training."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config, self.moe, self.options = config, config.moe, config.options

    @classmethod
    def build(cls, config: LayerConfig) -> Router:
        """The router of a layer; a class may leave some layers to another."""
        return cls(config)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose experts.

        Args:
            x_TD: normalised states of the tokens, in the model's type.
            context: what else is known of them.
        """
        raise NotImplementedError

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        """``route``, with the hooks that engines put around a module's call.

        Raises:
            ConfigError: the answer is none for these tokens, or the context knows the experts of others.
        """
        if self.training:
            self.ran = True
        context = context or RoutingContext()
        known_TR = context.expert_ids_TR
        if known_TR is not None and not _are_ids(known_TR, len(x_TD)):
            raise ConfigError(
                f"RoutingContext.expert_ids_TR is {_kind(known_TR)}; give int64 [{len(x_TD)}, R], a row for each token"
            )
        with without_autocast(x_TD.device) as autocast:
            if autocast is not None:
                # Autocast may have left states narrower than the weights, and no longer makes them one type.
                x_TD = x_TD.to(next((weight.dtype for weight in self.parameters()), x_TD.dtype))
            routing = _checked(self.route(x_TD, context), self.name, len(x_TD))
        # A router with a discrete path has named its rows: the norm follows that path alone.
        return replace(routing, output_norm="all") if self.moe.output_norm and not routing.output_norm else routing

    def told_experts(self, context: RoutingContext) -> Tensor:
        """Experts that are known ahead, int64 ``[T, R]`` with R of ``told_rows``.

        Raises:
            ValueError: the context has none, or another number per token.
        """
        ids_TR, rows = context.expert_ids_TR, self.told_rows(self.options)
        if ids_TR is None or ids_TR.dim() != 2 or ids_TR.shape[1] != rows:
            raise ValueError(
                f"the {self.name} router needs RoutingContext.expert_ids_TR, {rows} column(s): {self.told_by}"
            )
        return ids_TR

    def experts_of_tokens(self, routing: Routing, tokens: int) -> Tensor:
        """Experts of each of T tokens for diagnostics, int64 of one shape over the whole run; -1: none.

        Of slots it is the expert of the one that weighs most.
        """
        ids_TR = routing.expert_ids_TR
        if routing.slots is not None:
            return ids_TR[routing.slots.strongest_T]
        if routing.tokens_M is None:
            return ids_TR
        experts_TN = ids_TR.new_full((tokens, self.moe.num_experts), -1)
        # An expert takes a token once at most: no place is written twice, so the order of writing does not show.
        experts_TN[routing.tokens_M, ids_TR[:, 0]] = ids_TR[:, 0]
        return experts_TN


class TopKOptions(RouterOptions):
    """Options of routers that weigh the experts they choose."""

    softmax_over: SoftmaxOver = option(
        SoftmaxOver.AUTO,
        "weights of the chosen experts: softmax over chosen or all; "
        "auto: over all for learned routers at top_k 1, else over the chosen",
    )


class Float32Linear(nn.Linear):
    """A bias-free product in float32 whatever the weights' type.

    A module of its own because ZeRO-3 gathers weights around a module's forward and backward, by its tensors.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        # In bfloat16 close logits become equal, and which of several equal ones topk takes is not specified.
        return F.linear(x_TD.float(), self.weight.float())


class StatefulRouter(SteppedState, Router):
    """A router with state in buffers that moves once per optimizer step.

    ``route`` adds to ``pending`` by ``observe``; ``StateSync`` sums it over all ranks at the step boundary and calls
    ``update``. So neither ranks, nor accumulation, nor recomputation change what is learned. ``updates`` counts
    optimizer steps and is saved: whatever depends on the step reads it.

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig, Routing, StatefulRouter, StateSync
        >>> class LeastLoadedRouter(StatefulRouter):
        ...     def __init__(self, config):
        ...         super().__init__(config, config.moe.num_experts)  # the shape of the statistics
        ...         self.register_buffer("loads_N", torch.zeros(config.moe.num_experts))
        ...     def route(self, x_TD, context):
        ...         ids_T1 = self.loads_N.argmin().expand(len(x_TD), 1)
        ...         if self.observing:
        ...             self.observe(ids_T1.flatten().bincount(minlength=self.moe.num_experts))
        ...         return Routing(ids_T1)
        ...     def learn(self, statistics):
        ...         self.loads_N += statistics
        >>> router = LeastLoadedRouter(LayerConfig(16, MoEConfig(router="topk", num_experts=2)))
        >>> sync = StateSync(router)
        >>> for step in range(2):
        ...     chosen = router(torch.randn(8, 16)).expert_ids_TR
        ...     sync.step()
        >>> router.loads_N.tolist()
        [8.0, 8.0]

    Args:
        config: of its layer.
        statistics: shape of the statistics; ``(0,)`` where none are needed.
    """

    updates: Tensor

    def __init__(self, config: LayerConfig, *statistics: int) -> None:
        super().__init__(config)
        self._shape = statistics or (0,)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._updates = HostMirror()
        self.clear_statistics()

    @property
    def steps_taken(self) -> int:
        """``updates`` as a number."""
        return self._updates.read(self.updates)

    @property
    def pending(self) -> Tensor:
        """This rank's statistics since the last update, float64."""
        if self._pending is None:
            # Zeros and not nothing: a rank that observed no token enters the fused all-reduce with the shapes of the
            # others.
            return torch.zeros(self._shape, dtype=torch.float64, device=self.updates.device)
        return self._pending

    @torch.no_grad()
    def observe(self, statistics: Tensor) -> None:
        """Add those of one micro-batch.

        Raises:
            ConfigError: they have another shape than ``__init__`` was given, by which ranks add them up.
        """
        if not isinstance(statistics, Tensor) or statistics.shape != self._shape:
            raise ConfigError(
                f"the {self.name} router observed {_kind(statistics)}, and its StatefulRouter.__init__ was told of "
                f"statistics {list(self._shape)}; give it their shape"
            )
        self.count_micro_batch()
        # float64: counts are exact, and the order in which micro-batches and ranks are added does not show in float32
        # state.
        self._pending = self.pending + statistics.double()

    def clear_statistics(self) -> None:
        """Forget what was gathered since the last update (a step that is not taken leaves no trace)."""
        self._pending = None
        self.micro_batches = 0

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """Move the state by the statistics of all ranks; the same on every rank."""
        # Before the count: to `learn`, `steps_taken` are the steps before this one.
        self.learn(statistics)
        self._updates.write(self.updates, self.steps_taken + 1)
        self.clear_statistics()

    def learn(self, statistics: Tensor) -> None:
        """Move the buffers by these sums over ranks and micro-batches."""

    def averaging(self, decay: float) -> float:
        """Decay of running statistics: a plain mean over the first steps, which would weigh the start too much."""
        return min(decay, self.steps_taken / (self.steps_taken + 1))


def gathered(module: nn.Module) -> AbstractContextManager[object]:
    """Context with the whole weights of a module, where ZeRO-3 holds them in pieces; all ranks enter it together."""
    weights = list(module.parameters())
    if not hasattr(weights[0], "ds_id"):
        return nullcontext()
    # Not at the top: the layer works without DeepSpeed, and weights have a ds_id only where it holds them in pieces.
    import deepspeed

    # Without modifier_rank, for reading alone: what is written inside is not told to the other ranks.
    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(weights)
    return context


def choose(logits_TN: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    """The k largest logits, the largest first: experts and weights ``[T, k]``, softmax over all N or the k chosen."""
    # topk sorts: column 0 is the first choice, the cluster of the token in the next layer of adaptive_clustering.
    top_probs_Tk, ids_Tk = logits_TN.softmax(dim=-1).topk(top_k, dim=-1)
    return ids_Tk, top_probs_Tk if over_all else top_probs_Tk / top_probs_Tk.sum(-1, keepdim=True)


def softmax_over_all(over: SoftmaxOver, top_k: int, learned: bool = True) -> bool:
    """Whether softmax is over all experts; ``auto``: where one choice would leave a learned router no gradient."""
    if over is SoftmaxOver.AUTO:
        return learned and top_k == 1
    return over is SoftmaxOver.ALL


def auxiliary_loss(
    logits_TN: Tensor, ids_Tk: Tensor, config: MoEConfig, context: RoutingContext | None = None
) -> Tensor:
    """Switch's balance loss ``N sum_e f_e P_e`` and ST-MoE's z-loss ``mean(logsumexp^2)``, by their weights.

    ``f_e`` is the share of all T k choices that went to expert e, ``P_e`` its mean probability. Where ranks share
    sequences (``context.share``), f is that of the whole ones; P and z are linear, so the mean over the ranks is right.
    """
    context = context or RoutingContext()
    aux, tokens = z_loss(logits_TN, config, context.mean_tokens), context.mean_tokens
    if config.balance_weight:
        choices = max(1, ids_Tk.numel()) if tokens is None else tokens * ids_Tk.shape[1]
        share_N = count_experts(ids_Tk, config.num_experts).float() / choices
        if context.share is not None:
            # A collective, in forward and again in a recomputation: configuration and share are the same on all ranks
            # of the group, so all of them come here.
            share_N = context.share.mean(share_N)
        mean_N = _mean(logits_TN.softmax(dim=-1), tokens)
        aux = aux + config.balance_weight * config.num_experts * (share_N * mean_N).sum()
    return aux


def z_loss(logits_TN: Tensor, config: MoEConfig, tokens: float | None = None) -> Tensor:
    """ST-MoE's z-loss ``mean(logsumexp^2)`` by its weight, scalar; ``tokens``: as ``RoutingContext.mean_tokens``."""
    if not config.z_loss_weight:
        return logits_TN.new_zeros(())
    return config.z_loss_weight * _mean(logits_TN.logsumexp(dim=-1).square(), tokens)


def _mean(x_T: Tensor, tokens: float | None) -> Tensor:
    """Mean over tokens, or their sum over another number of them; 0 where there are none."""
    return x_T.mean(dim=0) if tokens is None and len(x_T) else x_T.sum(dim=0) / (tokens or 1)


def mean_of_all(x_TC: Tensor, tokens: float | None) -> Tensor:
    """Mean of all values of all tokens; ``tokens`` as ``RoutingContext.mean_tokens``."""
    return x_TC.mean() if tokens is None and len(x_TC) else x_TC.sum() / ((tokens or 1) * x_TC.shape[1])


def count_experts(ids: Tensor, num_experts: int) -> Tensor:
    """Occurrences of each expert, int64 ``[N]``."""
    return count_ids(ids.reshape(1, -1), num_experts)[0]


def sum_by_expert(x_MD: Tensor, ids_M: Tensor, num_experts: int) -> Tensor:
    """Sums of the rows of each expert, float32 ``[N, D]``, in an order that never changes."""
    return sum_by_code(x_MD.float(), ids_M.unsqueeze(0), num_experts)[0]


def drawn(
    shape: tuple[int, ...], scale: float, seed: int, *name: int | str, dtype: torch.dtype | None = None
) -> Tensor:
    """Normal numbers that follow from the seed and a name, whatever else is drawn.

    So every rank and layout has the same, and models that differ in one part are equal in all others.
    """
    # Not hash(), which Python salts anew in every process: ranks would draw different numbers.
    digest = hashlib.sha256("/".join(map(str, (seed, *name))).encode()).digest()
    # On the CPU, whose numbers are the same everywhere; a GPU's would be another model of the same seed.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator, dtype=dtype) * scale


@torch.no_grad()
def draw_linear_maps(router: nn.Module, seed: int, layer: int) -> None:
    """Initial weights of a router's linear maps, from (seed, layer, name): all that have a gate have the same."""
    for name, module in router.named_modules():
        if isinstance(module, nn.Linear):
            shape, role = tuple(module.weight.shape), name.rsplit(".", 1)[-1]
            module.weight.copy_(drawn(shape, module.in_features**-0.5, seed, layer, role))
            if module.bias is not None:
                module.bias.zero_()

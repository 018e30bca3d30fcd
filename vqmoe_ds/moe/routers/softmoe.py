"""Soft MoE: experts see slots, which are mixtures of all tokens of a sequence. Not causal.

Legend: B sequences, S tokens of one, T = B S tokens, D width, N experts, p slots per expert, C = N p slots of a
sequence, M = B C routed rows, K = N clusters.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.fields import MOST_TOKENS, option
from vqmoe_ds.config.routers import LooksAhead, RouterOptions, register_router
from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.adaptive_clustering import ClusteredRouter, ClusterOptions, FeatureScaling
from vqmoe_ds.moe.routers.base import Router, Routing, RoutingContext, Slots, drawn


class SlotScores(nn.Module):
    """``s x . phi_c / ||phi_c||`` in float32 with learned phi and s; x comes with unit length."""

    def __init__(self, width: int, slots: int, seed: int, layer: int) -> None:
        super().__init__()
        self.slots_CD = nn.Parameter(drawn((slots, width), width**-0.5, seed, layer, "slots"))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, unit_TD: Tensor) -> Tensor:
        return unit_TD.float() @ (self.scale.float() * F.normalize(self.slots_CD.float(), dim=-1)).t()


@register_router("softmoe")
class SoftMoERouter(Router):
    """Soft MoE (Puigcerver 2023, algorithm 1 and section 2.3).

    ``L = s (X / |X|) (Phi / |Phi|)``, ``[S, N p]``, of each sequence. Slot c sees ``sum_t softmax_t(L_tc) x_t``, and
    token t gathers ``sum_c softmax_c(L_tc) y_c`` of the outputs. Each expert has exactly ``B p`` rows, so load is equal
    by construction and there is no auxiliary loss. ``p`` is ``router.slots``, by default so many that a sequence has
    about ``moe.top_k`` slots per token.

    **Not causal**: every token sees all others of its sequence. Sequences of one length only.
    """

    class Options(RouterOptions):
        slots: int = option(
            0,
            "slots per expert; 0: moe.top_k times the tokens of a sequence over the experts, one or more",
            "slots",
            ge=0,
            le=MOST_TOKENS,
        )

    structure: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.slots = _slots(self.moe, self.options, config.sequence_length)
        self.scores = SlotScores(config.width, self.moe.num_experts * self.slots, config.seed, config.layer)

    @classmethod
    def check(cls, run: RunConfig) -> None:
        if run.finetune.classes:
            raise ValueError(
                f"moe.router={cls.name} mixes the tokens of sequences of one length, and texts to classify have any; "
                "use another router"
            )

    @classmethod
    def looks_ahead(cls, options: Any) -> LooksAhead | None:
        return LooksAhead(f"moe.router={cls.name} mixes all tokens of a sequence, later ones included")

    @classmethod
    def calls_per_token(cls, run: RunConfig) -> int:
        return -(-_slots_of_sequence(run) // run.model.sequence_length)

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        """Logits, mixtures and what tokens gather: three products of the same size."""
        return 3 * 2 * run.model.width * _slots_of_sequence(run)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        return self._mix(x_TD, F.normalize(x_TD.float(), dim=-1), context)

    def _mix(self, x_TD: Tensor, unit_TD: Tensor, context: RoutingContext) -> Routing:
        """Slots of states, by the scores of vectors of (about) unit length."""
        if context.lengths is not None:
            raise ValueError(f"the {self.name} router mixes the tokens of sequences of one length, not of several")
        length = max(1, context.sequence or len(x_TD))
        shape = (len(x_TD) // length, length)
        logits_BSC = self.scores(unit_TD).unflatten(0, shape)
        dispatch_BCS = logits_BSC.softmax(dim=1).transpose(1, 2).to(x_TD.dtype)
        inputs_MD = (dispatch_BCS @ x_TD.unflatten(0, shape)).flatten(0, 1)
        # Rows stand sequence by sequence and slot by slot, as `inputs_MD` is flattened and `Slots.gather` reads the
        # outputs.
        experts_C = torch.arange(self.moe.num_experts, device=x_TD.device).repeat_interleave(self.slots)
        return Routing(experts_C.repeat(shape[0]).unsqueeze(1), slots=Slots(inputs_MD, logits_BSC.softmax(dim=2)))


@register_router("softmoe_ac")
class SoftMoEACRouter(ClusteredRouter, SoftMoERouter):
    """Soft MoE under the metric of adaptive clustering (Nielsen 2025, ACMoE's vision models).

    With the diagonal ``M_c`` of a token's cluster c, the expert whose slot weighed most for it in the MoE layer before:
    ``L = s (M_c x / |x|) . phi / |phi|``, and slots are mixtures of ``M_c x``. M is that of ``adaptive_clustering``, of
    the vectors of unit length. The first ``router.plain_layers`` are ``softmoe``.
    """

    class Options(ClusterOptions, SoftMoERouter.Options):
        scaling: FeatureScaling = option(
            FeatureScaling.GLOBAL, "mean weight 1 per feature over clusters, or global over both (the default here)"
        )
        smoothing: float = option(
            0.35, "added to deviations of vectors of unit length before they are inverted", ge=1e-4, le=1e4
        )

    structure = ("slots", "statistics", "scaling", "plain_layers")

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.smallest = self.options.smoothing

    @classmethod
    def build(cls, config: LayerConfig) -> Router:
        return cls(config) if config.layer >= config.options.plain_layers else SoftMoERouter(config)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        unit_TD = F.normalize(x_TD.float(), dim=-1)
        weights_TD = self.feature_weights(unit_TD.detach(), context)
        return self._mix(x_TD * weights_TD.to(x_TD.dtype), unit_TD * weights_TD, context)


def _slots(moe: MoEConfig, options: Any, length: int) -> int:
    """Slots per expert for sequences of so many tokens."""
    return int(options.slots) or max(1, moe.top_k * length // moe.num_experts)


def _slots_of_sequence(run: RunConfig) -> int:
    return run.moe.num_experts * _slots(run.moe, run.router, run.model.sequence_length)

"""The AC router: features weighed by how tight the token's cluster is in them.

Legend: T tokens, D width, N experts, k experts chosen; K = N clusters, the experts of the MoE layer before.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.fields import LARGEST_WEIGHT, MOST_LAYERS, option
from vqmoe_ds.config.routers import LooksAhead, RouterOptions, register_router
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import (
    Router,
    Routing,
    RoutingContext,
    StatefulRouter,
    TopKOptions,
    auxiliary_loss,
    choose,
    count_experts,
    drawn,
    softmax_over_all,
    sum_by_expert,
)
from vqmoe_ds.moe.routers.topk import TopKRouter

SMALLEST = 1e-4
"""Added to deviations before they are inverted, as released."""


class ClusterStatistics(StrEnum):
    RUNNING = "running"
    BATCH = "batch"
    NONE = "none"


class FeatureScaling(StrEnum):
    PER_FEATURE = "per_feature"
    GLOBAL = "global"


class DirectionScores(nn.Module):
    """``x . e_i / ||e_i||`` in float32 with learned e; the token side keeps its length, as released."""

    def __init__(self, width: int, num_experts: int, seed: int, layer: int) -> None:
        super().__init__()
        self.experts_ND = nn.Parameter(drawn((num_experts, width), width**-0.5, seed, layer, "experts"))

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD.float() @ F.normalize(self.experts_ND.float(), dim=-1).t()


class ClusterOptions(RouterOptions):
    """Options of routers that weigh features by clusters."""

    decay: float = option(0.99, "decay of running statistics per step", ge=0, lt=1)
    statistics: ClusterStatistics = option(
        ClusterStatistics.RUNNING,
        "running (causal), batch (as published, not causal), none (all weights 1, the control)",
    )
    scaling: FeatureScaling = option(
        FeatureScaling.PER_FEATURE, "mean weight 1 per feature over clusters, or global over both"
    )
    feature_clip: float = option(10.0, "largest weight, as a multiple of the mean", gt=1, le=LARGEST_WEIGHT)

    plain_layers: int = option(
        1, "first MoE layers without clusters; the release of the text models has 2", "layers", ge=1, le=MOST_LAYERS
    )


class ClusteredRouter(StatefulRouter):
    """Base of routers that weigh the features of a token by how tight its cluster is in them (``feature_weights``).

    A token's cluster is the first choice of the MoE layer before. ``router.statistics`` says whose tokens: ``running``,
    those of earlier optimizer steps (deviations from the running mean, summed over all ranks; causal); ``batch``, as
    published, those of this micro-batch, later positions included, **not causal**; ``none``, weights of 1.
    """

    weights_KD: Tensor
    totals_KS: Tensor
    smallest = SMALLEST
    """Added to deviations before they are inverted."""

    def __init__(self, config: LayerConfig) -> None:
        clusters, width = config.moe.num_experts, config.width
        # Of each cluster: tokens, their sum; tokens that had a mean to deviate from, the sum of deviations.
        super().__init__(config, clusters, 2 * width + 2)
        self.width = width
        self.register_buffer("weights_KD", torch.ones(clusters, width, dtype=torch.float32))
        self.register_buffer("totals_KS", torch.zeros(clusters, 2 * width + 2, dtype=torch.float64))

    @classmethod
    def check(cls, run: RunConfig) -> None:
        super().check(run)
        model, plain = run.model, getattr(run.router, "plain_layers", 1)
        layers = len(model.moe_blocks)
        if layers < 2:
            raise ValueError(
                f"moe.router={cls.name} looks at the choices of the MoE layer before, so it needs two or more: "
                f"raise model.layers={model.layers} or lower model.moe_every={model.moe_every}"
            )
        if layers <= plain:
            raise ValueError(
                f"router.plain_layers={plain} leaves no layer to moe.router={cls.name}, of {layers} MoE layers; "
                f"lower it or raise model.layers={model.layers}"
            )

    @torch.no_grad()
    def feature_weights(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Diagonal of M for each token, float32 ``[T, D]``; ``x_TD``: float32 states whose statistics they are of."""
        clusters_T = context.previous_T
        if clusters_T is None:
            raise ValueError(f"the {self.name} router needs the choices of the MoE layer before it")
        if self.options.statistics is ClusterStatistics.BATCH:
            deviations_KD, counts_K = _deviations(x_TD, clusters_T, self.moe.num_experts)
            return self._weigh(deviations_KD, counts_K)[clusters_T]
        if self.options.statistics is ClusterStatistics.RUNNING and self.observing:
            self.observe(self._statistics(x_TD, clusters_T))
        return self.weights_KD[clusters_T]

    def _weigh(self, deviations_KD: Tensor, counts_K: Tensor) -> Tensor:
        return feature_weights(deviations_KD, counts_K, self.options.scaling, self.options.feature_clip, self.smallest)

    def _statistics(self, x_TD: Tensor, clusters_T: Tensor) -> Tensor:
        clusters = self.moe.num_experts
        counts_K = count_experts(clusters_T, clusters).double()
        # Deviations are from the mean of earlier steps: that of these tokens is known after the last of them only, and
        # depends on how a batch is split. Clusters without a mean yet have nothing to deviate from.
        known_K = self.totals_KS[:, 0] > 0
        apart_TD = (x_TD - self._means()[clusters_T].float()).abs()
        apart_KD = sum_by_expert(apart_TD, clusters_T, clusters) * known_K.unsqueeze(1)
        sums_KD = sum_by_expert(x_TD, clusters_T, clusters)
        # The columns of `totals_KS`, where `_means` and `learn` look for them.
        return torch.cat([counts_K.unsqueeze(1), sums_KD, (counts_K * known_K).unsqueeze(1), apart_KD], dim=1)

    def _means(self) -> Tensor:
        return self.totals_KS[:, 1 : self.width + 1] / self.totals_KS[:, :1].clamp_min(1e-12)

    def learn(self, statistics: Tensor) -> None:
        if self.options.statistics is not ClusterStatistics.RUNNING:
            return
        decay = self.averaging(self.options.decay)
        # Counts decay with the sums that they divide, so each quotient is a weighted mean.
        self.totals_KS.mul_(decay).add_(statistics, alpha=1 - decay)
        counts_K = self.totals_KS[:, self.width + 1]
        deviations_KD = self.totals_KS[:, self.width + 2 :] / counts_K.clamp_min(1e-12).unsqueeze(1)
        self.weights_KD.copy_(self._weigh(deviations_KD, counts_K))


@register_router("adaptive_clustering")
class AdaptiveClusteringRouter(ClusteredRouter):
    """AC router of *Tight Clusters Make Specialized Experts* (Nielsen 2025, ACMoE; definitions 1 and 2).

    A token's cluster c is the first choice of the MoE layer before. In each cluster and feature q,
    ``s_qc = mean |x_q - mean x_q|`` over its tokens, and ``M_c = diag(1 / s_qc)``, clipped and scaled to mean 1. Scores
    are ``(M_c x) . e_i / ||e_i||``, TopK and softmax as usual. The experts see x itself. M has no gradient.

    ``router.statistics=none`` is the control, M = 1, which differs in nothing else. A cluster without two tokens, or
    whose tokens are all alike, has M = 1 and takes no part in clip and scale. The first MoE layer has no layer before
    it: its router is the linear one, as is that of the other first ``router.plain_layers``.
    """

    class Options(ClusterOptions, TopKOptions):
        pass

    structure = ("softmax_over", "statistics", "scaling", "plain_layers")

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.over_all = softmax_over_all(self.options.softmax_over, self.moe.top_k)
        self.scores = DirectionScores(config.width, self.moe.num_experts, config.seed, config.layer)

    @classmethod
    def build(cls, config: LayerConfig) -> Router:
        return cls(config) if config.layer >= config.options.plain_layers else TopKRouter(config)

    @classmethod
    def looks_ahead(cls, options: Any) -> LooksAhead | None:
        if options.statistics is not ClusterStatistics.BATCH:
            return None
        return LooksAhead(
            "router.statistics=batch looks at all tokens of a batch, later ones included",
            "train with router.statistics=running",
        )

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TN = self.scores(x_TD.float() * self.feature_weights(x_TD.detach().float(), context))
        ids_Tk, weights_Tk = choose(logits_TN, self.moe.top_k, self.over_all)
        return Routing(ids_Tk, weights_Tk, auxiliary_loss(logits_TN, ids_Tk, self.moe, context))


def _deviations(x_TD: Tensor, clusters_T: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Mean absolute deviation within each cluster ``[K, D]``, and the tokens of each."""
    counts_K = count_experts(clusters_T, num_clusters)
    divisor_K1 = counts_K.clamp_min(1).unsqueeze(1)
    means_KD = sum_by_expert(x_TD, clusters_T, num_clusters) / divisor_K1
    apart_TD = (x_TD - means_KD[clusters_T]).abs()
    return sum_by_expert(apart_TD, clusters_T, num_clusters) / divisor_K1, counts_K


def feature_weights(
    deviations_KD: Tensor, counts_K: Tensor, scaling: FeatureScaling, clip: float, smallest: float = SMALLEST
) -> Tensor:
    """``1 / deviation``, clipped at ``clip`` times the mean and scaled to a mean of 1, ``[K, D]``.

    ``per_feature`` divides by the mean over clusters, feature by feature, after the clip (the language-model release);
    ``global`` by the one mean over all, taken before the clip (the vision release). Clusters that say nothing have
    weight 1: under two tokens, or no deviation in any feature, whose inverse of 10,000 would drown all others.
    """
    usable_K1 = ((counts_K >= 2) & (deviations_KD.mean(dim=1) > SMALLEST)).unsqueeze(1)
    usable = usable_K1.sum().clamp_min(1)
    inverse_KD = torch.where(usable_K1, 1 / (deviations_KD + smallest), torch.zeros_like(deviations_KD))
    mean = inverse_KD.sum() / (usable * inverse_KD.shape[1])
    clipped_KD = inverse_KD.clamp(max=clip * mean)
    scale = clipped_KD.sum(dim=0, keepdim=True) / usable if scaling is FeatureScaling.PER_FEATURE else mean
    return torch.where(usable_K1, clipped_KD / scale.clamp_min(1e-12), torch.ones_like(clipped_KD))

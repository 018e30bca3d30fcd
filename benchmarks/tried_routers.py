"""Routers that were tried beside the built-in ones: experts over a threshold, and pairs of small codebooks.

A plug-in, for benchmarks/grids/recipe-search.yaml, whose head has the commands:

export VQMOE_PLUGINS=benchmarks/tried_routers.py

Legend: T tokens, D width (of the vectors of ``codebook.source`` too), N experts, M routed rows, B bins of scores,
C codes of a codebook, V vocabulary.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe import LayerConfig, RouterOptions, Routing, RoutingContext, StatefulRouter, option, register_router
from vqmoe_ds.moe.routers.base import Float32Linear, count_experts, drawn, sum_by_expert, z_loss
from vqmoe_ds.moe.routers.hash_token import hash_of_tokens

BINS = 1024


@register_router("expert_threshold")
class ExpertThresholdRouter(StatefulRouter):
    """Expert Threshold (Sun 2026, arXiv 2603.11535): expert i takes every token with ``s_i = sigmoid(W x) > c_i``.

    Expert choice made causal, without a balance loss: a token has any number of experts, ``moe.top_k`` in the mean.
    ``c_i`` is a running mean of the score that a share k / N of the tokens of all ranks exceed, read once per optimizer
    step from counts in ``BINS`` bins, which sum over ranks. The weight of a row is ``s_i``. Weight, decay and start are
    our choice, as only the paper's abstract was read.
    """

    class Options(RouterOptions):
        decay: float = option(0.9, "decay of running thresholds per step", ge=0, lt=1)

    thresholds_N: Tensor

    def __init__(self, config: LayerConfig) -> None:
        experts = config.moe.num_experts
        super().__init__(config, experts, BINS)
        self.gate = Float32Linear(config.width, experts)
        # States have a unit root mean square, so that the logits of a new gate are standard normal.
        first = NormalDist().inv_cdf(1 - min(config.moe.top_k, experts - 0.5) / experts)
        self.register_buffer("thresholds_N", torch.full((experts,), first).sigmoid())

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TN = self.gate(x_TD)
        scores_TN = logits_TN.sigmoid()
        tokens_M, experts_M = (scores_TN.detach() > self.thresholds_N).nonzero(as_tuple=True)
        if self.observing:
            experts = self.moe.num_experts
            bins_TN = (scores_TN.detach() * BINS).long().clamp(max=BINS - 1)
            cells_TN = bins_TN + BINS * torch.arange(experts, device=bins_TN.device)
            self.observe(count_experts(cells_TN, experts * BINS).view(experts, BINS))
        aux_loss = z_loss(logits_TN, self.moe, context.mean_tokens)
        return Routing(experts_M.unsqueeze(1), scores_TN[tokens_M, experts_M].unsqueeze(1), aux_loss, tokens_M)

    def learn(self, statistics: Tensor) -> None:
        wanted = statistics[0].sum() * self.moe.top_k / self.moe.num_experts
        above_NB = statistics.flip(1).cumsum(1).flip(1)  # tokens in a bin and over it
        bins_N = (above_NB >= wanted).sum(1).sub(1).clamp(min=0)
        here_N, below_N = (x_NB.gather(1, bins_N[:, None])[:, 0] for x_NB in (statistics, above_NB))
        found_N = (bins_N + (below_N - wanted) / here_N.clamp(min=1)) / BINS
        decay = self.averaging(self.options.decay)
        self.thresholds_N.copy_(decay * self.thresholds_N.double() + (1 - decay) * found_N)


@register_router("hash_and_pair")
class HashAndPairRouter(StatefulRouter):
    """``hash_and_code`` with two small codebooks in the place of one: the second is of what the first leaves.

    A code is a pair, and pairs go to experts by a balanced hash. Both codebooks learn by running k-means on the vectors
    of ``codebook.source``; a code of less than a tenth of the mean count takes half of the busiest one.
    """

    class Options(RouterOptions):
        codes: int = option(16, "codes of each codebook", ge=2, le=1024)
        decay: float = option(0.99, "decay of running statistics per step", ge=0, lt=1)

    structure = ("codes",)
    needs_top_k = False
    needs_token_ids = True
    reads_source = True
    table_V: Tensor
    pairs_P: Tensor
    sums_2CD: Tensor
    counts_2C: Tensor

    def __init__(self, config: LayerConfig) -> None:
        codes, width = config.options.codes, config.width
        super().__init__(config, 2, codes, width + 1)
        self.gate = nn.Linear(width, 2)
        seed = 4 * (config.seed * 1000 + config.layer)
        for place, (name, values) in enumerate((("table_V", config.vocab_size), ("pairs_P", codes * codes))):
            self.register_buffer(name, hash_of_tokens(values, config.moe.num_experts, 1, seed + place)[0])
        self.register_buffer("sums_2CD", drawn((2, codes, width), 1.0, config.seed, config.layer, "codes"))
        self.register_buffer("counts_2C", torch.ones(2, codes))

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return 2

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        codes: int = run.router.codes  # type: ignore[attr-defined]
        return 2 * run.model.width * (2 * codes + 2)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        assert context.token_ids_T is not None and context.source_TD is not None
        left_TD, pair_T = F.rms_norm(context.source_TD, context.source_TD.shape[-1:], eps=1e-6), 0
        statistics = []
        for sums_CD, counts_C in zip(self.sums_2CD, self.counts_2C, strict=True):
            means_CD = sums_CD / counts_C.unsqueeze(1)
            ids_T = (left_TD @ means_CD.t() - means_CD.square().sum(1) / 2).argmax(dim=1)
            if self.observing:
                rows_TE = torch.cat([left_TD, torch.ones_like(left_TD[:, :1])], dim=1)
                statistics.append(sum_by_expert(rows_TE, ids_T, len(counts_C)))
            left_TD, pair_T = left_TD - means_CD[ids_T], pair_T * len(counts_C) + ids_T
        if statistics:
            self.observe(torch.stack(statistics))
        experts_T2 = torch.stack([self.table_V[context.token_ids_T], self.pairs_P[pair_T]], dim=1)
        return Routing(experts_T2, self.gate(x_TD).float().softmax(dim=-1))

    def learn(self, statistics: Tensor) -> None:
        decay = self.averaging(self.options.decay)
        sums = torch.cat([self.sums_2CD, self.counts_2C.unsqueeze(2)], dim=2).double()
        sums = decay * sums + (1 - decay) * statistics
        for level, sums_CE in enumerate(sums):
            for code in (sums_CE[:, -1] < 0.1 * sums_CE[:, -1].mean()).nonzero()[:, 0].tolist():
                busiest = int(sums_CE[:, -1].argmax())
                half_E = sums_CE[busiest] / 2
                shift_D = drawn((len(half_E) - 1,), 0.01, self.config.seed, self.config.layer, level, code).to(half_E)
                sums_CE[busiest] = half_E
                sums_CE[code, -1], sums_CE[code, :-1] = half_E[-1], half_E[:-1] + half_E[-1] * shift_D
        self.sums_2CD.copy_(sums[..., :-1])
        self.counts_2C.copy_(sums[..., -1])

"""Routers that were tried beside the built-in ones: experts over a threshold, pairs of small codebooks, and codes of a
mixture of tokens that learns.

A plug-in, for benchmarks/grids/recipe-search.yaml, whose head has the commands:

export VQMOE_PLUGINS=benchmarks/tried_routers.py

Legend: T tokens, D width (of the vectors of ``codebook.source`` too), N experts, M routed rows, B bins of scores,
C codes of a codebook, V vocabulary, W tokens of a mixture.
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
        left_TD = F.rms_norm(context.source_TD, context.source_TD.shape[-1:], eps=1e-6)
        pair_T = torch.zeros_like(context.token_ids_T)
        statistics = []
        for sums_CD, counts_C in zip(self.sums_2CD, self.counts_2C, strict=True):
            ids_T, means_CD = nearest(left_TD, sums_CD, counts_C)
            if self.observing:
                statistics.append(sums_and_counts(left_TD, ids_T, len(counts_C)))
            left_TD, pair_T = left_TD - means_CD[ids_T], pair_T * len(counts_C) + ids_T
        if statistics:
            self.observe(torch.stack(statistics))
        experts_T2 = torch.stack([self.table_V[context.token_ids_T], self.pairs_P[pair_T]], dim=1)
        return Routing(experts_T2, self.gate(x_TD).float().softmax(dim=-1))

    def learn(self, statistics: Tensor) -> None:
        decay = self.averaging(self.options.decay)
        for level in range(2):
            seed = self.config.seed, self.config.layer, level
            move_codes(self.sums_2CD[level], self.counts_2C[level], statistics[level], decay, *seed)


def nearest(vectors_TD: Tensor, sums_CD: Tensor, counts_C: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code of each vector, and the codes, ``[C, D]``."""
    means_CD = sums_CD / counts_C.unsqueeze(1)
    return (vectors_TD @ means_CD.t() - means_CD.square().sum(1) / 2).argmax(dim=1), means_CD


def sums_and_counts(vectors_TD: Tensor, ids_T: Tensor, codes: int) -> Tensor:
    """The sum of the vectors of each code and, in the last column, their number, ``[C, D + 1]``."""
    return sum_by_expert(torch.cat([vectors_TD, torch.ones_like(vectors_TD[:, :1])], dim=1), ids_T, codes)


def move_codes(sums_CD: Tensor, counts_C: Tensor, step_CE: Tensor, decay: float, *seed: int) -> None:
    """Move running sums and counts by ``sums_and_counts`` of a step, in place.

    A code of less than a tenth of the mean count takes half of the busiest one's vectors, a little moved.
    """
    sums_CE = torch.cat([sums_CD, counts_C.unsqueeze(1)], dim=1).double()
    sums_CE = decay * sums_CE + (1 - decay) * step_CE
    for code in (sums_CE[:, -1] < 0.1 * sums_CE[:, -1].mean()).nonzero()[:, 0].tolist():
        busiest = int(sums_CE[:, -1].argmax())
        half_E = sums_CE[busiest] / 2
        shift_D = drawn((len(half_E) - 1,), 0.01, *seed, code).to(half_E)
        sums_CE[busiest] = half_E
        sums_CE[code, -1], sums_CE[code, :-1] = half_E[-1], half_E[:-1] + half_E[-1] * shift_D
    sums_CD.copy_(sums_CE[:, :-1])
    counts_C.copy_(sums_CE[:, -1])


@register_router("hash_and_mix")
class HashAndMixRouter(StatefulRouter):
    """``hash_and_code`` whose code looks at a mixture of the last tokens that learns.

    The gate between the two experts reads the mixture beside the state, so the loss moves its weights. Codes look at
    the running mean of these weights over steps, so experts are known before the first block all the same. Tokens of
    other documents of a packed window are mixed in, too.
    """

    class Options(RouterOptions):
        codes: int = option(64, "codes of the codebook", ge=2, le=1024)
        window: int = option(3, "tokens of the mixture, the last one included", ge=1, le=16)
        decay: float = option(0.99, "decay of running statistics and weights per step", ge=0, lt=1)

    structure = ("codes", "window")
    needs_top_k = False
    needs_token_ids = True
    reads_source = True
    table_V: Tensor
    experts_C: Tensor
    sums_CD: Tensor
    counts_C: Tensor
    slow_W: Tensor

    def __init__(self, config: LayerConfig) -> None:
        codes, window, width = config.options.codes, config.options.window, config.width
        # In one row: sums and counts of codes, the mixture's weights, and how often they were counted.
        super().__init__(config, codes * (width + 1) + window + 1)
        self.gate, self.reader = nn.Linear(width, 2), nn.Linear(width, 2, bias=False)
        self.mixture_W = nn.Parameter(torch.zeros(window))
        seed, experts = 4 * (config.seed * 1000 + config.layer), config.moe.num_experts
        self.register_buffer("table_V", hash_of_tokens(config.vocab_size, experts, 1, seed)[0])
        self.register_buffer("experts_C", hash_of_tokens(codes, experts, 1, seed + 1)[0])
        self.register_buffer("sums_CD", drawn((codes, width), 1.0, config.seed, config.layer, "codes"))
        self.register_buffer("counts_C", torch.ones(codes))
        self.register_buffer("slow_W", torch.full((window,), 1 / window))

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return 2

    @classmethod
    def needs_whole_sequences(cls, options: Any) -> bool:
        return True

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        codes: int = run.router.codes  # type: ignore[attr-defined]
        return 2 * run.model.width * (codes + 4)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        assert context.token_ids_T is not None and context.source_TD is not None
        sequence = context.sequence or len(x_TD)
        source_BSD = context.source_TD.unflatten(0, (-1, sequence))
        window = len(self.slow_W)
        padded_BSD = F.pad(source_BSD, (0, 0, window - 1, 0))
        # The token itself first, then those before it; nothing stands before the first of a sequence.
        last_WTD = torch.stack([padded_BSD[:, w : w + sequence].flatten(0, 1) for w in reversed(range(window))])
        weights_W = self.mixture_W.float().softmax(dim=0)
        mixed_TD, slow_TD = (
            F.rms_norm(torch.einsum("w,wtd->td", x_W, last_WTD), x_TD.shape[-1:], eps=1e-6)
            for x_W in (weights_W, self.slow_W)
        )
        codes_T, _ = nearest(slow_TD, self.sums_CD, self.counts_C)
        if self.observing:
            sums_CE = sums_and_counts(slow_TD, codes_T, len(self.counts_C)).double()
            self.observe(torch.cat([sums_CE.flatten(), weights_W.detach().double(), sums_CE.new_ones(1)]))
        experts_T2 = torch.stack([self.table_V[context.token_ids_T], self.experts_C[codes_T]], dim=1)
        logits_T2 = self.gate(x_TD).float() + self.reader(mixed_TD.to(x_TD.dtype)).float()
        return Routing(experts_T2, logits_T2.softmax(dim=-1))

    def learn(self, statistics: Tensor) -> None:
        decay = self.averaging(self.options.decay)
        counted, weights_W, times = statistics.tensor_split((-len(self.slow_W) - 1, -1))
        step_CE = counted.view(len(self.counts_C), -1)
        move_codes(self.sums_CD, self.counts_C, step_CE, decay, self.config.seed, self.config.layer)
        self.slow_W.copy_(decay * self.slow_W.double() + (1 - decay) * weights_W / times)

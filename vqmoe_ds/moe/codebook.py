"""Codebooks of all MoE layers, stacked in one module: lookup, statistics and learning.

Legend: L MoE layers, K codes, C code width, T tokens, N experts, S samples.

Everything here is local to one rank and free of communication; ``CodebookSync`` brings the statistics
of all ranks together once per optimizer step and then calls ``update``. All state is float32 (float64
for running sums) in *buffers*: DeepSpeed casts parameters to bf16 but leaves buffers alone, and never
broadcasts, shards or averages them behind our back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.schema import CodebookConfig
from vqmoe_ds.moe.clustering import balanced_map, kmeans, split_crowded


class CodebookBank(nn.Module):
    """``num_layers`` codebooks of ``num_codes`` vectors and their code-to-expert tables.

    Args:
        config: how the codes are looked up and learned.
        num_layers: MoE layers served, each with a codebook of its own.
        num_experts: experts a layer has; ``code_map_LK`` starts as ``k mod num_experts`` (the
            paper's hash).
        width: width of the vectors that are looked up, before the optional projection to
            ``config.code_dim``.
        seed: of the random codes and the projection; the same on every rank.
    """

    codes_LKC: Tensor
    ema_sum_LKC: Tensor
    ema_count_LK: Tensor
    code_map_LK: Tensor
    updates: Tensor
    born_at: Tensor
    usage_LK: Tensor
    adam_mean_LKC: Tensor
    adam_square_LKC: Tensor
    projection_DC: Tensor | None

    def __init__(self, config: CodebookConfig, num_layers: int, num_experts: int, width: int, seed: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.num_layers, self.num_codes = num_layers, config.num_codes or num_experts
        code_width = config.code_dim or width
        shape = (num_layers, self.num_codes, code_width)
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randn(shape, generator=generator)
        projection = None
        if config.code_dim:
            projection = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:, : config.code_dim]
        self.register_buffer("projection_DC", projection)
        self.register_buffer("codes_LKC", F.normalize(codes, dim=-1) if config.distance == "cosine" else codes)
        self.register_buffer("ema_sum_LKC", self.codes_LKC.clone())
        self.register_buffer("ema_count_LK", torch.ones(shape[:2]))
        hash_table = torch.arange(self.num_codes) % num_experts
        self.register_buffer("code_map_LK", hash_table.repeat(num_layers, 1))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("born_at", torch.full((), -1, dtype=torch.int64))  # update at which codes were placed
        if config.learning == "gradient":
            self.register_buffer("adam_mean_LKC", torch.zeros(shape))
            self.register_buffer("adam_square_LKC", torch.zeros(shape))
        self.clear_statistics()
        self.register_buffer("usage_LK", torch.zeros(shape[:2], dtype=torch.float64), persistent=False)

    # ---------------------------------------------------------------- lookup

    def compared(self, source_TD: Tensor) -> Tensor:
        """The vectors that are compared with the codes: float32, normalised and projected as configured."""
        z_TC = source_TD.float()
        if self.config.normalize_source:
            z_TC = F.rms_norm(z_TC, z_TC.shape[-1:], eps=1e-6)
        if self.projection_DC is not None:
            z_TC = z_TC @ self.projection_DC
        return F.normalize(z_TC, dim=-1) if self.config.distance == "cosine" else z_TC

    @torch.no_grad()
    def prepare(self, source_TD: Tensor) -> Tensor:
        """``compared`` without gradient, for lookups and statistics."""
        return self.compared(source_TD.detach())

    @torch.no_grad()
    def lookup(self, layer: int, z_TC: Tensor) -> Tensor:
        """Index of the nearest code of one layer, int64 ``[T]``; ties go to the lowest index (paper Eq. 3)."""
        return _half_distances(z_TC, self.codes_LKC[layer]).argmin(dim=-1)

    @torch.no_grad()
    def lookup_all(self, z_TC: Tensor, tokens_T: Tensor | None = None) -> Tensor:
        """Codes of every layer for one shared source in a single product, int64 ``[L, T]``.

        Args:
            z_TC: the vectors.
            tokens_T: their tokens, where a vector follows from its token alone: each is looked up once.
        """
        if tokens_T is not None:
            distinct_U, which_T = tokens_T.unique(return_inverse=True)
            place_U = torch.empty_like(distinct_U).scatter_(0, which_T, torch.arange(len(z_TC), device=z_TC.device))
            return self.lookup_all(z_TC[place_U])[:, which_T]
        distances = _half_distances(z_TC, self.codes_LKC.flatten(0, 1))
        return distances.view(-1, self.num_layers, self.num_codes).argmin(dim=-1).t().contiguous()

    # ------------------------------------------------------------ statistics

    def clear_statistics(self) -> None:
        """Forget what was gathered since the last update (a step that is not taken leaves no trace)."""
        self._pending: Tensor | None = None
        self._samples: list[list[Tensor]] = [[] for _ in range(self.num_layers)]

    @property
    def moving(self) -> bool:
        """Whether the codes still learn: not frozen for good and not past ``freeze_step``."""
        freeze = self.config.freeze_step
        return self.config.learning != "frozen" and (freeze == 0 or int(self.updates) < freeze)

    @torch.no_grad()
    def observe(self, layer: int, z_TC: Tensor, codes_T: Tensor) -> None:
        """Add one micro-batch of one layer to the statistics of this optimizer step.

        Called in forward. Does nothing in evaluation, nor while activation checkpointing runs the
        forward a second time inside backward: a token counts once.
        """
        if not self.training or recomputing():
            return
        if self._pending is None:
            self._pending = self._no_statistics()
        count_K = torch.bincount(codes_T, minlength=self.num_codes)
        self._pending[layer, :, -1] += count_K
        if self.moving:
            self._pending[layer, :, :-1] += _sum_by_code(z_TC, codes_T, self.num_codes)
            keep = 4 * self.num_codes if self.born and not self.halving_due else self.config.kmeans_samples
            self._samples[layer].append(_evenly(z_TC, keep) if len(z_TC) > keep else z_TC)

    @property
    def pending(self) -> Tensor:
        """This rank's statistics, float64 ``[L, K, C + 1]``: sums of vectors, and counts in the last column."""
        return self._no_statistics() if self._pending is None else self._pending

    def _no_statistics(self) -> Tensor:
        layers, codes, width = self.codes_LKC.shape
        return torch.zeros(layers, codes, width + 1, dtype=torch.float64, device=self.codes_LKC.device)

    def samples(self, micro_batch: int, count: int) -> Tensor:
        """``count`` evenly spaced vectors of one micro-batch for every layer, float32 ``[L, count, C]``."""
        return torch.stack([_evenly(layer_samples[micro_batch], count) for layer_samples in self._samples])

    # -------------------------------------------------------------- learning

    @property
    def born(self) -> bool:
        """Whether the codes have been placed on data; random before."""
        return int(self.born_at) >= 0

    @property
    def birth_due(self) -> bool:
        return not self.born and self.moving and int(self.updates) + 1 >= self.config.birth_step

    def dead_codes(self) -> Tensor:
        """Codes whose running count fell under ``dead_below`` of the mean, bool ``[L, K]``."""
        count_LK = self.ema_count_LK
        return count_LK < self.config.dead_below * count_LK.mean(dim=1, keepdim=True)

    @torch.no_grad()
    def update(self, stats_LKC1: Tensor) -> None:
        """Learn from the statistics of all ranks (``pending`` summed): EMA, or one Adam step.

        EMA is that of VQ-VAE without Laplace smoothing: a code nobody chose keeps its place. The gradient
        rule is exact: the codebook loss ``mean((sg[z] - v)^2)`` has the gradient
        ``2 (n_k v_k - sum_k) / (T C)``, which needs only the sums and counts gathered here (paper 1.1).
        """
        sums_LKC, counts_LK = stats_LKC1[..., :-1], stats_LKC1[..., -1]
        self.usage_LK += counts_LK
        if self.moving:
            if self.config.learning == "gradient":
                self._adam_step(sums_LKC, counts_LK)
            else:
                self._ema_step(sums_LKC, counts_LK)
            if self.config.distance == "cosine":
                self.codes_LKC.copy_(F.normalize(self.codes_LKC, dim=-1))
        self.updates += 1

    @property
    def halving_due(self) -> bool:
        """Whether this step looks for crowded codes: every tenth while codes are young and embeddings move most."""
        age = int(self.updates) + 1 - int(self.born_at)
        young = self.born and self.moving and age <= self.config.decay_steps
        return young and age % 10 == 0 and self.config.crowded_above > 0

    def crowded_codes(self) -> Tensor:
        """Codes whose running count exceeds ``crowded_above`` times the mean, bool ``[L, K]``."""
        count_LK = self.ema_count_LK
        return count_LK > self.config.crowded_above * count_LK.mean(dim=1, keepdim=True)

    def decay(self) -> float:
        """EMA decay at this update: from ``decay`` at birth to ``decay_final``, linear over ``decay_steps``."""
        c = self.config
        age = int(self.updates) - max(0, int(self.born_at))
        done = min(1.0, age / c.decay_steps) if c.decay_steps else 1.0
        return c.decay + (c.decay_final - c.decay) * done

    def _ema_step(self, sums_LKC: Tensor, counts_LK: Tensor) -> None:
        decay = self.decay()
        self.ema_count_LK.copy_(self.ema_count_LK.double() * decay + counts_LK * (1 - decay))
        self.ema_sum_LKC.copy_(self.ema_sum_LKC.double() * decay + sums_LKC * (1 - decay))
        means_LKC = self.ema_sum_LKC / self.ema_count_LK.clamp_min(1e-12).unsqueeze(-1)
        # Codes that fade away keep their place: their mean is a quotient of two vanishing numbers.
        alive_LK1 = (self.ema_count_LK > 1e-6).unsqueeze(-1)
        self.codes_LKC.copy_(torch.where(alive_LK1, means_LKC, self.codes_LKC))

    def _adam_step(self, sums_LKC: Tensor, counts_LK: Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        elements_L11 = (counts_LK.sum(dim=1).clamp_min(1) * sums_LKC.shape[-1]).view(-1, 1, 1)
        gradient = 2 * (counts_LK.unsqueeze(-1) * self.codes_LKC.double() - sums_LKC) / elements_L11
        self.adam_mean_LKC.copy_(betas[0] * self.adam_mean_LKC + (1 - betas[0]) * gradient)
        self.adam_square_LKC.copy_(betas[1] * self.adam_square_LKC + (1 - betas[1]) * gradient.square())
        step = int(self.updates) + 1
        mean = self.adam_mean_LKC / (1 - betas[0] ** step)
        square = self.adam_square_LKC / (1 - betas[1] ** step)
        self.codes_LKC -= self.config.learning_rate * mean / (square.sqrt() + 1e-8)
        self.ema_count_LK.copy_(0.9 * self.ema_count_LK + 0.1 * counts_LK)

    @torch.no_grad()
    def give_birth(self, samples_LSC: Tensor) -> None:
        """Place all codes by k-means (or at random samples) and, for the balanced map, draw the table."""
        for layer, samples_SC in enumerate(samples_LSC):
            generator = torch.Generator().manual_seed(1000003 * (layer + 1))
            iterations = self.config.kmeans_iterations if self.config.init == "kmeans" else 0
            codes_KC, sizes_K = kmeans(samples_SC, self.num_codes, iterations, generator)
            if self.config.distance == "cosine":
                codes_KC = F.normalize(codes_KC, dim=-1)
            self.codes_LKC[layer] = codes_KC
            mean_count = self.pending[layer, :, -1].sum() / self.num_codes
            self.ema_count_LK[layer] = sizes_K / sizes_K.sum() * self.num_codes * mean_count.clamp_min(1.0)
            self.ema_sum_LKC[layer] = codes_KC * self.ema_count_LK[layer].unsqueeze(-1)
            if self.config.code_map == "balanced":
                self.code_map_LK[layer] = balanced_map(sizes_K, self.num_experts)
        self.born_at.copy_(self.updates)

    @torch.no_grad()
    def halve_crowded(self, samples_LSC: Tensor) -> None:
        """Cut crowded codes in halves as at birth; codes that moved start with the weight of their new clusters.

        Rare tokens gather round codes near the middle of all, which no decay undoes.
        """
        for layer in self.crowded_codes().any(dim=1).nonzero().flatten().tolist():
            codes_KC, sizes_K = split_crowded(samples_LSC[layer], self.codes_LKC[layer], self.config.crowded_above)
            moved_K = (codes_KC != self.codes_LKC[layer]).any(dim=1)
            weight = self.ema_count_LK[layer].sum() / sizes_K.sum()
            self.codes_LKC[layer] = codes_KC
            self.ema_count_LK[layer, moved_K] = sizes_K[moved_K] * weight
            self.ema_sum_LKC[layer, moved_K] = codes_KC[moved_K] * self.ema_count_LK[layer, moved_K].unsqueeze(-1)

    @torch.no_grad()
    def reseed(self, dead_LK: Tensor, candidates_LSC: Tensor) -> None:
        """Move dead codes onto fresh tokens, each with the running statistics of an average code.

        Resetting only the code would let the stale sums pull it back at the next update.
        """
        for layer in range(self.num_layers):
            dead = dead_LK[layer].nonzero().flatten()[: candidates_LSC.shape[1]]
            fresh = candidates_LSC[layer, : len(dead)]
            mean_count = self.ema_count_LK[layer].mean()
            self.codes_LKC[layer, dead] = fresh
            self.ema_count_LK[layer, dead] = mean_count
            self.ema_sum_LKC[layer, dead] = fresh * mean_count

    def fingerprint(self) -> Tensor:
        """Two int64 numbers that differ whenever codes or tables differ in one bit."""
        bits = self.codes_LKC.view(torch.int32).long().flatten()
        weights = torch.arange(1, bits.numel() + 1, device=bits.device)
        table = self.code_map_LK.flatten()
        return torch.stack([(bits * weights).sum(), (table * weights[: table.numel()]).sum()])


def _half_distances(z_TC: Tensor, codes_KC: Tensor) -> Tensor:
    """``(||v||^2 / 2 - z.v)``: orders codes as the squared distance does, one product, float32."""
    half_norms_K = codes_KC.square().sum(dim=-1) / 2
    return torch.addmm(half_norms_K, z_TC, codes_KC.t(), alpha=-1)


def _evenly(z_TC: Tensor, count: int) -> Tensor:
    return z_TC[torch.linspace(0, len(z_TC) - 1, count, device=z_TC.device).long()]


def _sum_by_code(z_TC: Tensor, codes_T: Tensor, num_codes: int) -> Tensor:
    """Sums of the vectors of each code, ``[K, C]``, in an order that never changes."""
    if z_TC.device.type == "cpu":  # sequential, so deterministic
        return z_TC.new_zeros(num_codes, z_TC.shape[1]).index_add_(0, codes_T, z_TC)
    return F.one_hot(codes_T, num_codes).to(z_TC.dtype).t() @ z_TC


def recomputing() -> bool:
    """True inside backward, where activation checkpointing repeats the forward (both modes)."""
    return bool(torch._C._current_graph_task_id() != -1)

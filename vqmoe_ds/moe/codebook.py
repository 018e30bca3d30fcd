"""Codebooks of all MoE layers, stacked in one module: lookup, statistics and learning.

Legend: L MoE layers, K codes, C code width, T tokens, N experts, S samples, U distinct tokens.

Everything here is local to one rank and free of communication; ``StateSync`` brings the statistics
of all ranks together once per optimizer step and then calls ``update``. All state is float32 (float64
for running sums) in *buffers*: DeepSpeed casts parameters to bf16 but leaves buffers alone, and never
broadcasts, shards or averages them behind our back. On a GPU, no forward and no plain ``update`` waits for
the device: what is due is decided by numbers that the host knows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.config.schema import CodebookConfig
from vqmoe_ds.moe.kernels.codes import nearest_codes, normalized
from vqmoe_ds.moe.kernels.integers import count_ids
from vqmoe_ds.moe.kernels.statistics import add_by_code, follow_means
from vqmoe_ds.moe.mirror import HostMirror
from vqmoe_ds.moe.sequence import SequenceShare, evenly
from vqmoe_ds.moe.state import SteppedState, without_autocast
from vqmoe_ds.runtime.errors import ConfigError

RELEASED_STD = 0.02
"""Standard deviation of the codes of ``codebook.init=normal``: the authors' release redraws every embedding so."""


class CodebookBank(SteppedState):
    """``num_layers`` codebooks of ``num_codes`` vectors and their code-to-expert tables.

    A layer of codes has one of its own, unless its model passes one that all layers share:

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import CodebookBank, LayerConfig, MoEConfig, MoELayer, RoutingContext
        >>> moe = MoEConfig(router="vq", num_experts=4, expert_hidden=32, top_k=0)
        >>> config = LayerConfig(width=16, moe=moe, layer=1, shared_codebook=True)
        >>> bank = CodebookBank(config.codebook, num_layers=2, num_experts=4, width=16, seed=0)
        >>> y_BSD, _, expert_ids_TR = MoELayer(config)(torch.randn(2, 8, 16), RoutingContext(codebooks=bank))
        >>> expert_ids_TR.shape
        torch.Size([16, 1])

    Args:
        config: how the codes are looked up and learned.
        num_layers: MoE layers served, each with a codebook of its own.
        num_experts: experts per layer; ``code_map_LK`` starts as ``k mod num_experts`` (the
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
    adam_steps_LK: Tensor
    projection_DC: Tensor | None
    share: SequenceShare | None = None
    """The part of every sequence that this rank sees, where ranks share them."""
    model_rate: float | None = None
    """The model's learning rate in this step, which the codes take where ``config.learning_rate`` is 0."""

    def __init__(self, config: CodebookConfig, num_layers: int, num_experts: int, width: int, seed: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.num_layers, self.num_codes = num_layers, config.num_codes or num_experts
        code_width = config.code_dim or width
        shape = (num_layers, self.num_codes, code_width)
        # Drawn on the CPU, whose numbers are the same everywhere: all ranks start from the same bits.
        generator = torch.Generator().manual_seed(seed)
        # Not PyTorch's default type: under another one the same seed would be another model, or means would not move.
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
        codes = draw(shape) * (RELEASED_STD if config.init == "normal" else 1.0)
        projection = None
        if config.code_dim:
            projection = torch.linalg.qr(draw(width, width))[0][:, : config.code_dim]
        # No name of a buffer may contain "expert": DeepSpeed's checkpoints of a native MoE layer, where VQGate holds a
        # bank, drop such keys or fail at them.
        self.register_buffer("projection_DC", projection)
        self.register_buffer("codes_LKC", F.normalize(codes, dim=-1) if config.distance == "cosine" else codes)
        # Sum over count is the code from the start, so the first EMA step moves it and does not replace it.
        self.register_buffer("ema_sum_LKC", self.codes_LKC.clone())
        self.register_buffer("ema_count_LK", torch.ones(shape[:2], dtype=torch.float32))
        hash_table = torch.arange(self.num_codes) % num_experts
        # A copy for each layer and no expanded view: tables are redrawn layer by layer.
        self.register_buffer("code_map_LK", hash_table.repeat(num_layers, 1))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # Update at which codes were initialized, -1 before. Checkpoints hold it, so it keeps its first name.
        self.register_buffer("born_at", torch.full((), -1, dtype=torch.int64))
        if config.learning == "gradient":
            self.register_buffer("adam_mean_LKC", torch.zeros(shape, dtype=torch.float32))
            self.register_buffer("adam_square_LKC", torch.zeros(shape, dtype=torch.float32))
            # Of each code for itself: one that is placed anew is a new parameter to Adam.
            self.register_buffer("adam_steps_LK", torch.zeros(shape[:2], dtype=torch.int64))
        self._updates, self._born_at = HostMirror(), HostMirror()
        self.clear_statistics()
        self.register_buffer("usage_LK", torch.zeros(shape[:2], dtype=torch.float64), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        add_adam_steps(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ---------------------------------------------------------------- lookup

    def compared(self, source_TD: Tensor) -> Tensor:
        """The vectors that are compared with the codes: float32, normalised and projected as configured."""
        z_TC = source_TD.float()
        return self._projected(F.rms_norm(z_TC, z_TC.shape[-1:], eps=1e-6) if self.config.normalize_source else z_TC)

    @torch.no_grad()
    def prepare(self, source_TD: Tensor) -> Tensor:
        """``compared`` without gradient, for lookups and statistics."""
        source_TD = source_TD.detach()
        return self._projected(normalized(source_TD) if self.config.normalize_source else source_TD.float())

    def _projected(self, z_TC: Tensor) -> Tensor:
        if self.projection_DC is not None:
            with without_autocast(z_TC.device):
                z_TC = z_TC @ self.projection_DC.float()
        return F.normalize(z_TC, dim=-1) if self.config.distance == "cosine" else z_TC

    @torch.no_grad()
    def lookup(self, layer: int, z_TC: Tensor) -> Tensor:
        """Index of the nearest code of one layer, int64 ``[T]``; ties go to the lowest index (paper Eq. 3)."""
        return nearest_codes(z_TC, self.codes_LKC[layer : layer + 1].float())[0]

    @torch.no_grad()
    def lookup_all(self, z_TC: Tensor, tokens_T: Tensor | None = None, layers: slice = slice(None)) -> Tensor:
        """Codes of the layers that look at one source, in a single product, int64 ``[L, T]``.

        Args:
            z_TC: the vectors.
            tokens_T: their tokens, where a vector follows from its token alone: the CPU looks each up once. A GPU would
                wait for the number of distinct ones.
            layers: those that look at it.
        """
        if tokens_T is not None and z_TC.device.type == "cpu":
            distinct_U, which_T = tokens_T.unique(return_inverse=True)
            # Copies of a token write to one place in any order, for their vectors are equal and any of them will do.
            place_U = torch.empty_like(distinct_U).scatter_(0, which_T, torch.arange(len(z_TC), device=z_TC.device))
            return self.lookup_all(z_TC[place_U], layers=layers)[:, which_T]
        return nearest_codes(z_TC, self.codes_LKC[layers].float())

    def experts_of(self, codes_LT: Tensor, layers: slice = slice(None)) -> Tensor:
        """Experts that the codes of some layers name, int64 ``[L, T]``.

        With ``config.groups`` above 1 the layers begin with the first one, whose expert names a token's group: the
        experts ``g N / G`` to ``(g + 1) N / G`` of every layer.
        """
        experts_LT = self.code_map_LK[layers].gather(1, codes_LT)
        if self.config.groups == 1:
            return experts_LT
        size = self.num_experts // self.config.groups
        return experts_LT[:1] // size * size + experts_LT % size

    # ------------------------------------------------------------ statistics

    def clear_statistics(self) -> None:
        """Forget what was gathered since the last update (a step that is not taken leaves no trace)."""
        self._pending = None
        self._samples: list[list[Tensor]] = [[] for _ in range(self.num_layers)]
        self.micro_batches = 0

    @torch.no_grad()
    def observe_all(self, layers: slice, z_TC: Tensor, codes_LT: Tensor) -> None:
        """Add one micro-batch of the layers of one shared source to the statistics of this optimizer step.

        Called in forward. Does nothing in evaluation, nor while activation checkpointing runs the
        forward a second time inside backward: a token counts once.

        Args:
            layers: the layers that look at these vectors.
            z_TC: the vectors.
            codes_LT: what they looked up, for these layers alone.
        """
        if not self.observing:
            return
        if self._pending is None:
            # Not before there are tokens: None is how `idle` knows that there were none.
            self._pending = self._no_statistics()
        # Sources may serve the layers in parts; the one that serves the first counts the micro-batch.
        if layers.start == 0:
            self.count_micro_batch()
        if self.moving:
            # A slice of layers is a view; an index by a list would be a copy, and what is added to it lost.
            add_by_code(self._pending[layers], z_TC, codes_LT)
        else:
            self._pending[layers][..., -1] += count_ids(codes_LT, self.num_codes)
        if self.initialization_due or self.splitting_due or self.reseeding_due:
            # Re-seeding moves at most K codes, onto vectors of one micro-batch; clustering takes its samples from all
            # of them.
            keep = 4 * self.num_codes if self.initialized and not self.splitting_due else self.config.kmeans_samples
            if self.share is not None:
                sample_SC = self.share.sample(z_TC, keep)
            else:
                # A copy in either case: the vectors may be the caller's own, who may change them before the step ends.
                sample_SC = _evenly(z_TC, keep) if len(z_TC) > keep else z_TC.clone()
            for samples in self._samples[layers]:
                if len(samples) < self.accumulation_steps:  # more would grow without end where nobody calls StateSync
                    samples.append(sample_SC)

    def observe(self, layer: int, z_TC: Tensor, codes_T: Tensor) -> None:
        """``observe_all`` for one layer."""
        self.observe_all(slice(layer, layer + 1), z_TC, codes_T.unsqueeze(0))

    @property
    def pending(self) -> Tensor:
        """This rank's statistics, float64 ``[L, K, C + 1]``: sums of vectors, and counts in the last column."""
        return self._no_statistics() if self._pending is None else self._pending

    def _no_statistics(self) -> Tensor:
        # float64: the order in which micro-batches and ranks are added must not show in the codes.
        layers, codes, width = self.codes_LKC.shape
        return torch.zeros(layers, codes, width + 1, dtype=torch.float64, device=self.codes_LKC.device)

    def has_tokens(self, micro_batch: int) -> bool:
        """Whether a micro-batch of this optimizer step had tokens: an empty batch has none.

        Raises:
            ConfigError: there was no such micro-batch, or it had tokens for some layers alone.
        """
        counts = [len(samples[micro_batch]) if micro_batch < len(samples) else -1 for samples in self._samples]
        if any(counts) and min(counts) <= 0:
            raise ConfigError(
                f"the codebook of layer {counts.index(min(counts))} has seen no tokens in micro-batch {micro_batch} of "
                f"this optimizer step, but accumulation_steps={self.accumulation_steps}: call StateSync.step() once "
                "after every optimizer.step(), with StateSync(model, accumulation_steps) made before the first forward "
                "pass and as many micro-batches in training on every rank"
            )
        return any(counts)

    def samples(self, micro_batch: int, count: int) -> Tensor:
        """``count`` evenly spaced vectors of one micro-batch for every layer, float32 ``[L, count, C]``.

        Where ranks share sequences they are of whole ones, and zero where another rank holds them. All are zero where
        it had no tokens (``has_tokens``).
        """
        if not self.has_tokens(micro_batch):
            shape = (self.num_layers, count, self.codes_LKC.shape[2])
            return self.codes_LKC.new_zeros(shape, dtype=torch.float32)
        # Evenly spaced instead of drawn: there is no generator to keep in step over ranks and resumes.
        # Exactly `count`, some repeated where there are fewer: ranks gather and broadcast tensors of one shape.
        return torch.stack([_evenly(layer_samples[micro_batch], count) for layer_samples in self._samples])

    # ------------------------------------------ due at the end of this step

    @property
    def steps_taken(self) -> int:
        """``updates`` as a number: optimizer steps learned from."""
        return self._updates.read(self.updates)

    @property
    def initialized(self) -> bool:
        """Whether the codes have been initialized on data; random before."""
        return self._born_at.read(self.born_at) >= 0

    @property
    def moving(self) -> bool:
        """Whether the codes still learn: not frozen for good and not past ``freeze_step``."""
        freeze = self.config.freeze_step
        return self.config.learning != "frozen" and (freeze == 0 or self.steps_taken < freeze)

    @property
    def initialization_due(self) -> bool:
        """Whether codes are initialized on data."""
        on_data = not self.initialized and self.config.init != "normal"
        # The step under way, which is counted at its end.
        return on_data and self.moving and self.steps_taken + 1 >= self.config.init_step

    @property
    def splitting_due(self) -> bool:
        """Whether overused codes are looked for: every tenth step while codes are young and embeddings move most."""
        age = self.steps_taken + 1 - self._born_at.read(self.born_at)
        young = self.initialized and self.moving and age <= self.config.decay_steps
        return young and age % 10 == 0 and self.config.overused_above > 0

    @property
    def reseeding_due(self) -> bool:
        """Whether dead codes are looked for."""
        step, c = self.steps_taken + 1, self.config
        moving = self.moving and step != c.freeze_step  # codes that freeze at the end of this step stay where they are
        return c.dead_below > 0 and moving and (c.reseed_until == 0 or step <= c.reseed_until)

    def dead_codes(self) -> Tensor:
        """Codes whose running count fell under ``dead_below`` of the mean, bool ``[L, K]``."""
        return self.ema_count_LK < self.config.dead_below * self.ema_count_LK.mean(dim=1, keepdim=True)

    def overused_codes(self) -> Tensor:
        """Codes whose running count exceeds ``overused_above`` times the mean, bool ``[L, K]``."""
        return self.ema_count_LK > self.config.overused_above * self.ema_count_LK.mean(dim=1, keepdim=True)

    # -------------------------------------------------------------- learning

    @torch.no_grad()
    def update(self, stats_LKC1: Tensor) -> None:
        """Learn from the statistics of all ranks (``pending`` summed): EMA, or one Adam step.

        EMA is that of VQ-VAE without Laplace smoothing: a code nobody chose keeps its place. The gradient
        rule is exact: the codebook loss ``mean((sg[z] - v)^2)`` has the gradient
        ``2 (n_k v_k - sum_k) / (T C)``, which needs only the sums and counts gathered here (paper 1.1).
        """
        sums_LKC, counts_LK = stats_LKC1[..., :-1], stats_LKC1[..., -1]
        if self.moving:
            if self.config.learning == "gradient":
                self._adam_step(sums_LKC, counts_LK)
            else:
                follow_means(self.codes_LKC, self.ema_sum_LKC, self.ema_count_LK, stats_LKC1, self.decay())
            if self.config.distance == "cosine":
                self.codes_LKC.copy_(F.normalize(self.codes_LKC, dim=-1))
        # Last, for the decay above goes by the steps before this one.
        self.count(counts_LK)

    @torch.no_grad()
    def count(self, counts_LK: Tensor) -> None:
        """Note the use of codes in one optimizer step, float64, as all that is learned from it."""
        self.usage_LK += counts_LK
        self._updates.write(self.updates, self.steps_taken + 1)

    def decay(self) -> float:
        """EMA decay at this update: from ``decay`` of fresh codes to ``decay_final``, linear over ``decay_steps``."""
        c = self.config
        # Codes that were never initialized (-1) age from the first step on.
        age = self.steps_taken - max(0, self._born_at.read(self.born_at))
        done = min(1.0, age / c.decay_steps) if c.decay_steps else 1.0
        return c.decay + (c.decay_final - c.decay) * done

    def _adam_step(self, sums_LKC: Tensor, counts_LK: Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        rate = self.config.learning_rate or self.model_rate
        if rate is None:
            raise ConfigError(
                "codebook.learning_rate=0 takes the model's rate: set CodebookBank.model_rate before every "
                "StateSync.step(), or codebook.learning_rate to a rate of its own"
            )
        # The clamp gives a layer without tokens a gradient of 0 and not of 0 / 0.
        elements_L11 = (counts_LK.sum(dim=1).clamp_min(1) * sums_LKC.shape[-1]).view(-1, 1, 1)
        gradient = 2 * (counts_LK.unsqueeze(-1) * self.codes_LKC.double() - sums_LKC) / elements_L11
        self.adam_mean_LKC.copy_(betas[0] * self.adam_mean_LKC + (1 - betas[0]) * gradient)
        self.adam_square_LKC.copy_(betas[1] * self.adam_square_LKC + (1 - betas[1]) * gradient.square())
        self.adam_steps_LK += 1
        steps_LK1 = self.adam_steps_LK.double().unsqueeze(-1)
        mean = self.adam_mean_LKC / (1 - betas[0] ** steps_LK1)
        square = self.adam_square_LKC / (1 - betas[1] ** steps_LK1)
        self.codes_LKC -= rate * mean / (square.sqrt() + 1e-8)
        # No part of Adam: dead and overused codes are told by the running count.
        self.ema_count_LK.copy_(0.9 * self.ema_count_LK + 0.1 * counts_LK)

    @property
    def adam(self) -> list[Tensor]:
        """Adam's buffers, ``[L, K, ...]``: zero for a code that was just placed; none where codes learn otherwise."""
        gradient = self.config.learning == "gradient"
        return [self.adam_mean_LKC, self.adam_square_LKC, self.adam_steps_LK] if gradient else []

    def mark_initialized(self) -> None:
        """Note that the codes were initialized at this step."""
        self._born_at.write(self.born_at, self.steps_taken)

    @torch.no_grad()
    def reseed(self, dead_LK: Tensor, candidates_LSC: Tensor) -> None:
        """Move the i-th dead code of a layer onto its i-th fresh token, with the running statistics of an average code.

        Resetting only the code would let the stale sums pull it back at the next update. Dead codes beyond the last
        candidate stay.
        """
        which_LK = dead_LK.cumsum(dim=1) - 1  # of whole numbers, so deterministic on a GPU too
        moved_LK = dead_LK & (which_LK < candidates_LSC.shape[1])
        which_LKC = which_LK.clamp(0, candidates_LSC.shape[1] - 1).unsqueeze(-1).expand_as(self.codes_LKC)
        fresh_LKC, moved_LK1 = candidates_LSC.gather(1, which_LKC), moved_LK.unsqueeze(-1)
        mean_L1 = self.ema_count_LK.mean(dim=1, keepdim=True)
        # where() and no index by a mask: the host would wait for the number of codes that move.
        self.codes_LKC.copy_(torch.where(moved_LK1, fresh_LKC, self.codes_LKC))
        self.ema_count_LK.copy_(torch.where(moved_LK, mean_L1, self.ema_count_LK))
        self.ema_sum_LKC.copy_(torch.where(moved_LK1, fresh_LKC * mean_L1.unsqueeze(-1), self.ema_sum_LKC))
        for state in self.adam:
            state.masked_fill_(moved_LK if state.dim() == 2 else moved_LK1, 0)


def add_adam_steps(buffers: dict[str, Tensor], prefix: str) -> None:
    """Complete the buffers of a bank of an earlier version, where Adam counted ``updates`` for all codes alike."""
    mean, steps, updates = (prefix + name for name in ("adam_mean_LKC", "adam_steps_LK", "updates"))
    if steps not in buffers and {mean, updates} <= buffers.keys():
        buffers[steps] = buffers[updates].expand(buffers[mean].shape[:2]).clone()


def _evenly(z_TC: Tensor, count: int) -> Tensor:
    return z_TC[evenly(len(z_TC), count, z_TC.device)]

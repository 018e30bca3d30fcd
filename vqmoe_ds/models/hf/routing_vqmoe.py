"""Codes, routers and experts of the VQMoE language model for Hugging Face ``transformers``.

Exported folders carry this file. Where the trainer is installed its experts' kernel is used on CPU.

Legend: B batch, S new tokens, P past tokens in the cache, T = B * S tokens, D width, L MoE layers, K codes, C code
width, N experts, R routed rows per token, M = T * R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.utils.generic import maybe_autocast

from .configuration_vqmoe import VQMoEConfig

try:  # where the trainer is installed, its kernel on CPU: the same sums in the same order
    from vqmoe_ds.moe.kernels import experts as compiled
except ImportError:
    compiled = None  # type: ignore[assignment]

try:  # grouped products that torch.compile and torch.export take whole
    from transformers.integrations.moe import _grouped_linear as grouped_linear
except ImportError:
    grouped_linear = None

try:  # products of all experts by name
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:
    ALL_EXPERTS_FUNCTIONS = {}

Codes = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""The codebook as a function: a module among arguments would be moved about by whoever places models on devices."""


class VQMoEMLP(nn.Module):
    """One dense SwiGLU MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VQMoEExperts(nn.Module):
    """The SwiGLU experts of one layer, stacked.

    ``experts_implementation`` names the products: ``eager`` (each expert's own, the default), or one of transformers'
    functions, such as ``grouped_mm`` and ``batched_mm``, which find here what they ask of experts.
    """

    has_gate, has_bias, has_post_expert_norm = True, False, False
    is_concatenated, is_transposed, _is_expert_parallel = True, False, False

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__()
        self.config, self.num_experts = config, config.num_experts
        experts, hidden, width = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_TD: Tensor, expert_ids_TR: Tensor, discrete_offset_TD: Tensor | None) -> Tensor:
        """Outputs of the R experts of each token, ``[T, R, D]``; the offset is added to what the last of them sees.

        Raises:
            IndexError: an id is of no expert.
        """
        routes = expert_ids_TR.shape[1]
        # As in the trainer's dispatch: stable, and gathered by the inverse instead of added in place, so sums have one
        # order.
        ids_M, order_M = expert_ids_TR.flatten().sort(stable=True)
        places_M = torch.arange(order_M.shape[0], device=order_M.device)
        inverse_M = torch.empty_like(order_M).scatter_(0, order_M, places_M)
        rows_MD = x_TD.index_select(0, order_M // routes)
        if discrete_offset_TD is not None:
            offset_MD = discrete_offset_TD[order_M // routes]
            rows_MD = torch.where(_last_rows(order_M, routes), rows_MD + offset_MD, rows_MD)
        if self.config.expert_input_norm and self.config.router == "vq":
            normed_MD = F.layer_norm(rows_MD, rows_MD.shape[-1:])
            rows_MD = torch.where(_last_rows(order_M, routes), normed_MD, rows_MD)
        # bincount would make the host wait for the device.
        ends_N = torch.searchsorted(ids_M, torch.arange(len(self.gate_proj), device=ids_M.device), right=True)
        tracing = (torch.compiler.is_compiling() or torch.jit.is_tracing()) and grouped_linear is not None
        kind = self.config._experts_implementation
        if kind not in (None, "eager"):
            y_MD = self._run_theirs(kind, rows_MD, ids_M)
        elif tracing:
            y_MD = self._run_grouped(rows_MD, ids_M, ends_N)
        else:
            y_MD = self._run(rows_MD, ids_M, ends_N)
        return self._normed(y_MD.index_select(0, inverse_M).view(-1, routes, x_TD.shape[1]))

    def _normed(self, y_TRD: Tensor) -> Tensor:
        """The outputs with the LayerNorm that follows every expert, or with ``vq`` the last of each token."""
        if not self.config.expert_output_norm:
            return y_TRD
        first = y_TRD.shape[1] - 1 if self.config.router == "vq" else 0
        return torch.cat([y_TRD[:, :first], F.layer_norm(y_TRD[:, first:], y_TRD.shape[-1:])], dim=1)

    def _run(self, rows_MD: Tensor, ids_M: Tensor, ends_N: Tensor) -> Tensor:
        """Every row through its expert; rows are sorted by expert."""
        first, *ends, last = torch.cat([ids_M[:1], ends_N, ids_M[-1:]]).tolist()  # one copy to the host
        counts_N = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if first < 0 or last >= len(counts_N):
            raise IndexError(
                f"expert {first if first < 0 else last} was asked for, and experts are 0 to {len(counts_N) - 1}: "
                "code_map or token_table is not of this model; load its weights again"
            )
        # The kernel gets bare addresses of numbers of one type: neither autocast nor a compiler reaches into it.
        plain = rows_MD.dtype == self.gate_proj.dtype and rows_MD.device.type == "cpu"
        plain = plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
        if plain and compiled is not None and compiled.supports(rows_MD.dtype, *self.gate_proj.shape[:0:-1]):
            return compiled.CompiledExperts.apply(rows_MD, self.gate_proj, self.down_proj, self.up_proj, counts_N)
        # unbind, because indexing under autograd would build a full-size gradient for every expert.
        weights_N = zip(self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
        # Experts without rows may be left out: `unbind` gives their weights zeros as gradient.
        outputs = [
            F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            for rows, (gate, up, down) in zip(rows_MD.split(counts_N), weights_N, strict=True)
            if len(rows)
        ]
        return torch.cat(outputs)

    def _run_grouped(self, rows_MD: Tensor, ids_M: Tensor, ends_N: Tensor) -> Tensor:
        """The same without a look at any number, for graphs."""
        self._check_on_device(ids_M)
        ends_N = ends_N.int()
        gate_MH, up_MH = (grouped_linear(rows_MD, weight, ends_N) for weight in (self.gate_proj, self.up_proj))
        return grouped_linear(F.silu(gate_MH) * up_MH, self.down_proj, ends_N)

    def _run_theirs(self, kind: str, rows_MD: Tensor, ids_M: Tensor) -> Tensor:
        """The same by a function of transformers: a row is a token of one expert, whose weight is 1."""
        self._check_on_device(ids_M)
        ids_M1 = ids_M.unsqueeze(1)
        return ALL_EXPERTS_FUNCTIONS[kind](self, rows_MD, ids_M1, torch.ones_like(ids_M1, dtype=rows_MD.dtype))

    @property
    def gate_up_proj(self) -> Tensor:
        """Gate and up of every expert in one, ``[N, 2 H, D]``: a copy, joined whenever it is asked for."""
        return torch.cat([self.gate_proj, self.up_proj], dim=1)

    def _apply_gate(self, gate_up_M2H: Tensor) -> Tensor:
        gate_MH, up_MH = gate_up_M2H.chunk(2, dim=-1)
        return F.silu(gate_MH) * up_MH

    def _check_on_device(self, ids_M: Tensor) -> None:
        # Asynchronously: to raise an error here the host would have to read the ids, which breaks a graph.
        inside = (ids_M >= 0).all() & (ids_M < len(self.gate_proj)).all()
        torch._assert_async(inside, "an expert was asked for that this model does not have")

    def reset(self, std: float) -> None:
        """Draw initial weights."""
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            init.normal_(weight, std=std)


def _last_rows(order_M: Tensor, routes: int) -> Tensor:
    """Which sorted rows are the last of their tokens, bool ``[M, 1]``."""
    return (order_M % routes == routes - 1).unsqueeze(1)


class VQMoECodebook(nn.Module):
    """Codes of all MoE layers and the tables from codes to experts. Buffers: they do not learn here."""

    codes: Tensor
    code_map: Tensor
    projection: Tensor | None
    source_table: Tensor | None

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__()
        self.config = config
        layers, width = len(config.moe_blocks), config.hidden_size
        self.register_buffer("codes", torch.empty(layers, config.num_codes, config.code_dim or width))
        self.register_buffer("code_map", torch.empty(layers, config.num_codes, dtype=torch.int64))
        self.register_buffer("projection", torch.empty(width, config.code_dim) if config.code_dim else None)
        self.register_buffer("source_table", torch.empty(config.vocab_size, width) if config.source_table else None)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fill every buffer; the random ones always alike, so that all processes start from one model."""
        generator = torch.Generator().manual_seed(0)
        # By transformers' `init`, which passes over what a checkpoint has filled.
        init.copy_(self.codes, torch.randn(self.codes.shape, generator=generator, device="cpu"))
        init.copy_(
            self.code_map, (torch.arange(self.config.num_codes) % self.config.num_experts).expand_as(self.code_map)
        )
        if self.projection is not None:
            drawn_DC = torch.randn(self.projection.shape, generator=generator, device="cpu")
            init.copy_(self.projection, drawn_DC * len(drawn_DC) ** -0.5)
        if self.source_table is not None:
            init.zeros_(self.source_table)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> VQMoECodebook:
        """Stay float32 when the model is cast: in bfloat16 codes would send tokens elsewhere. Moves are followed."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                # `Module.to` and its like cast floating-point tensors only: as whole numbers the bits are moved but not
                # cast.
                bits = buffer.view(torch.int32) if buffer.is_floating_point() else buffer
                self._buffers[name] = fn(bits).view(buffer.dtype)
        return self

    def forward(self, source: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Experts of the nearest codes; ties go to the lowest code.

        Args:
            source: ``[T, D]``, or ids of tokens, whose vectors in the codebook's own table are then the answer.
            layer: whose experts; None: those of all layers.

        Returns:
            Experts, int64 ``[L, T]`` or ``[T]``. Of one layer also the codes ``[T, C]``, where the model blends or
            commits to them, and, where the model is weighted by it, their softmax probability ``[T]`` with gradient.
        """
        config = self.config
        if not source.is_floating_point():
            assert self.source_table is not None
            return F.embedding(source, self.source_table), None, None
        if layer is None:
            with torch.no_grad():
                distances = _half_distances(self._compared(source), self.codes.flatten(0, 1))
            codes_LT = distances.view(-1, *self.codes.shape[:2]).argmin(dim=-1).t()
            return self._grouped(self.code_map.gather(1, codes_LT)), None, None
        codes_KC = self.codes[layer]
        with torch.no_grad():
            codes_T = _half_distances(self._compared(source), codes_KC).argmin(dim=-1)
        soft_T = None
        if config.soft_output:
            distances_TK = torch.cdist(self._compared(source), codes_KC).square()
            soft_T = (-distances_TK / config.soft_output).softmax(dim=-1).amax(dim=-1)
        wanted = config.code_blend or config.commitment_coef
        return self.code_map[layer][codes_T], codes_KC[codes_T] if wanted else None, soft_T

    def _grouped(self, experts_LT: Tensor) -> Tensor:
        """The experts that codes name within the group that the first layer's names for all layers."""
        if self.config.code_groups == 1:
            return experts_LT
        size = self.config.num_experts // self.config.code_groups
        return experts_LT[:1] // size * size + experts_LT % size

    def _compared(self, source_TD: Tensor) -> Tensor:
        """The vectors that are compared with the codes: float32, normalised and projected as configured."""
        z_TC = source_TD.float()
        if self.config.normalize_source:
            # The epsilon that codes were learned with (`CodebookBank.compared`), whatever rms_norm_eps is.
            z_TC = F.rms_norm(z_TC, z_TC.shape[-1:], eps=1e-6)
        if self.projection is not None:
            z_TC = z_TC @ self.projection
        return F.normalize(z_TC, dim=-1) if self.config.code_distance == "cosine" else z_TC


def _half_distances(z_TC: Tensor, codes_KC: Tensor) -> Tensor:
    """``||v||^2 / 2 - z.v``: orders codes as the squared distance does."""
    # The product of the trainer's `nearest_codes`: near ties fall alike.
    return torch.addmm(codes_KC.square().sum(dim=-1) / 2, z_TC, codes_KC.t(), alpha=-1)


class VQMoEGate(nn.Linear):
    """The linear router: logits in float32 whatever the model's type. Adapters and quantised layers may replace it."""

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        with maybe_autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


class VQMoESparseMLP(nn.Module):
    """Experts under the routers ``vq``, ``topk``, ``hash_token``, ``hash_and_code`` and ``hash_ngrams``.

    ``y = g_c sum_i p_i E_i(x) + g_d E_{map(k)}(q)`` with ``k`` the nearest code, ``g`` the two-way softmax gate and
    ``q = x + c (v_k - x)``; one of the two paths may be missing. ``hash_and_code``: ``g_1 E_{hash(token)}(x) + g_2
    E_{map(k)}(x)``; ``hash_ngrams``: ``sum_n g_n E_{hash of the last n tokens}(x)``. Shared experts are added for every
    token.
    """

    def __init__(self, config: VQMoEConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        linear = config.router == "topk" or (config.router == "vq" and config.num_experts_per_tok > 0)
        self.gate = VQMoEGate(config) if linear else None
        self.path_gate = nn.Linear(config.hidden_size, 2) if linear and config.router == "vq" else None
        told = {"hash_and_code": 2, "hash_ngrams": config.ngrams}.get(config.router, 1)
        self.pair_gate = nn.Linear(config.hidden_size, told) if told > 1 and config.pair_gate else None
        self.experts = VQMoEExperts(config)
        hidden = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = VQMoEMLP(config.hidden_size, hidden) if hidden else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(
        self, x_BSD: Tensor, known_T: Tensor | None, codes: Codes, kept_BS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The layer's output, its auxiliary loss (0 outside training), which padding takes no part in, and logits."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        kept_T = None if kept_BS is None else kept_BS.flatten()
        weights_TR: Tensor | None
        offset_TD, logits_TN = None, None
        if self.gate is None:
            ids_TR, weights_TR, offset_TD, aux_loss = self._discrete_route(x_TD, known_T, codes, kept_T)
            if self.pair_gate is not None:
                weights_TR = self.pair_gate(x_TD).float().softmax(dim=-1)
        else:
            logits_TN = self.gate(x_TD).float()
            ids_TR, linear_TR, aux_loss = self._linear_route(logits_TN, kept_T)
            weights_TR = linear_TR
            if self.path_gate is not None:
                ids_T1, soft_T1, offset_TD, commitment = self._discrete_route(x_TD, known_T, codes, kept_T)
                gates_T2 = self.path_gate(x_TD).float().softmax(dim=-1)
                discrete_T1 = gates_T2[:, 1:] if soft_T1 is None else gates_T2[:, 1:] * soft_T1
                weights_TR = torch.cat([gates_T2[:, :1] * linear_TR, discrete_T1], dim=1)
                ids_TR = torch.cat([ids_TR, ids_T1], dim=1)
                aux_loss = aux_loss + commitment
        y_TRD = self.experts(x_TD, ids_TR, offset_TD)
        if weights_TR is not None:
            y_TRD = y_TRD * weights_TR.to(y_TRD.dtype).unsqueeze(-1)
        y_TD = y_TRD.sum(dim=1)
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = shared_TD * self.shared_expert_gate(x_TD).sigmoid()
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BSD), aux_loss, logits_TN

    def _linear_route(self, logits_TN: Tensor, kept_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen experts, their weights, and the auxiliary loss."""
        config = self.config
        probs_TN = logits_TN.softmax(dim=-1)
        weights_TR, ids_TR = probs_TN.topk(config.num_experts_per_tok, dim=-1)
        if config.norm_topk_prob:
            weights_TR = weights_TR / weights_TR.sum(-1, keepdim=True)
        aux_loss = logits_TN.new_zeros(())
        if self.training:
            chosen_TN = F.one_hot(ids_TR, config.num_experts).sum(dim=1).float()
            share_N = _mean(chosen_TN, kept_T) / ids_TR.shape[1]
            balance = config.num_experts * (share_N * _mean(probs_TN, kept_T)).sum()
            z_loss = _mean(logits_TN.logsumexp(dim=-1).square(), kept_T)
            aux_loss = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss
        return ids_TR, weights_TR, aux_loss

    def _discrete_route(
        self, x_TD: Tensor, known_T: Tensor | None, codes: Codes, kept_T: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Expert of each token's code, its weight (None: 1), the offset of its input, and the commitment loss."""
        config, offset_TD = self.config, None
        commitment = x_TD.new_zeros((), dtype=torch.float32)
        if known_T is not None:
            return known_T if known_T.dim() == 2 else known_T.unsqueeze(1), None, None, commitment
        # A device map may put the codebook on another device than this block.
        ids_T, codes_TC, soft_T = (None if t is None else t.to(x_TD.device) for t in codes(x_TD, self.layer))
        assert ids_T is not None
        if codes_TC is not None:
            difference_TD = codes_TC - x_TD.float()
            if config.code_blend:
                offset_TD = (config.code_blend * difference_TD.detach()).to(x_TD.dtype)
            if config.commitment_coef and self.training:
                commitment = config.commitment_coef * _mean(difference_TD.square().mean(dim=-1), kept_T)
        return ids_T.unsqueeze(1), None if soft_T is None else soft_T.unsqueeze(1), offset_TD, commitment


def _mean(rows_T: Tensor, kept_T: Tensor | None) -> Tensor:
    """Mean of the rows of real tokens; 0 where there are none."""
    if kept_T is None:
        return rows_T.mean(dim=0)
    kept = kept_T.view(-1, *[1] * (rows_T.dim() - 1))
    return rows_T.masked_fill(~kept, 0).sum(dim=0) / kept_T.sum().clamp_min(1)


# ---------------------------------------------------------------- what routes look back at


class _Sources:
    """A first layer of the cache that keeps, beside keys and values, the vectors or ids that later routes look back at.

    So they follow the cache wherever beam search reorders it, speculative decoding crops it or a batch is expanded.
    """

    sources: Tensor | None = None

    def remember(self, vectors_BSD: Tensor) -> Tensor:
        """Add those of new tokens, before their keys and values are added: ``[B, P + S, D]``, or more, with zeros."""
        self.sources = vectors_BSD if self.sources is None else torch.cat([self.sources, vectors_BSD], dim=1)
        return self.sources

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.sources = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(lambda sources: sources.index_select(0, beam_idx.to(sources.device)))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self._select(lambda sources: sources[:, : self.get_seq_length()])  # type: ignore[attr-defined]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._select(lambda sources: sources.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(lambda sources: sources[indices])

    def _select(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.sources is not None:
            self.sources = change(self.sources)


class VQMoEDynamicLayer(_Sources, DynamicLayer):
    """``DynamicLayer`` with what routes look back at."""


class VQMoESlidingWindowLayer(_Sources, DynamicSlidingWindowLayer):
    """``DynamicSlidingWindowLayer`` with what routes look back at, of all tokens."""


class VQMoEStaticSlidingWindowLayer(_Sources, StaticSlidingWindowLayer):
    """``StaticSlidingWindowLayer`` with what routes look back at, which grows: routes see past the window."""


class VQMoEStaticLayer(_Sources, StaticLayer):
    """``StaticLayer`` with what routes look back at."""

    def remember(self, vectors_BSD: Tensor) -> Tensor:
        if self.sources is None:
            self.sources = vectors_BSD.new_zeros(len(vectors_BSD), self.max_cache_len, vectors_BSD.shape[2])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.sources)
        # Where this call's keys will stand, which count up the length when they are added.
        places_S = torch.arange(vectors_BSD.shape[1], device=vectors_BSD.device) + self.get_seq_length()
        self.sources.index_copy_(1, places_S, vectors_BSD)
        return self.sources

    def crop(self, tokens_to_remove: int) -> None:
        StaticLayer.crop(self, tokens_to_remove)  # like keys, sources keep their length: what follows is written over

    def reset(self) -> None:
        sources = self.sources
        super().reset()
        self.sources = None if sources is None else sources.zero_()  # its address is part of compiled graphs


_LAYERS: dict[type, type] = {
    DynamicLayer: VQMoEDynamicLayer,
    StaticLayer: VQMoEStaticLayer,
    DynamicSlidingWindowLayer: VQMoESlidingWindowLayer,
    StaticSlidingWindowLayer: VQMoEStaticSlidingWindowLayer,
}


def source_layer(cache: Cache, sliding: bool = False) -> _Sources:
    """The first layer of a cache, made to keep source vectors.

    Args:
        cache: of one model.
        sliding: whether that model's attention has a window, as the layer of the cache may have.

    Raises:
        ValueError: it is of a kind that cannot, or another model filled it.
    """
    if not cache.layers:
        cache.layers.append(VQMoEDynamicLayer())
    first = cache.layers[0]
    if not isinstance(first, _Sources):
        if type(first) not in _LAYERS or (first.is_sliding and not sliding):
            raise ValueError(
                f"this model's routes look back at earlier tokens, which a {type(first).__name__} cannot keep: "
                "use a DynamicCache or a StaticCache"
            )
        if first.is_initialized and int(first.get_seq_length()):
            raise ValueError(
                "the cache holds nothing of what this model's routes look back at: fill it with this model"
            )
        kind: Any = _LAYERS[type(first)]
        # Without __init__ and with the state of the layer itself: a static one may have its memory already.
        cache.layers[0] = kind.__new__(kind)
        cache.layers[0].__dict__.update(first.__dict__)
    return cache.layers[0]

"""The VQMoE language model for Hugging Face ``transformers``: experts chosen by discrete codes.

Self-contained on purpose: exported folders carry this file, and it needs nothing but torch and transformers. Where the
trainer is installed its experts' kernel is used on CPU.

Legend: B batch, S new tokens, P past tokens in the cache, T = B * S tokens, D width, A heads, H width of a head,
I = A * H, L MoE layers, K codes, C code width, N experts, R routed rows a token, M = T * R rows, V vocabulary,
W context window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_vqmoe import VQMoEConfig

try:  # where the trainer is installed, its kernel on CPU: the same sums in the same order
    from vqmoe_ds.moe.kernels import experts as compiled
except ImportError:
    compiled = None  # type: ignore[assignment]

NO_TOKEN = -1
"""Stands in the history of token ids where there was padding or nothing."""


class VQMoERMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=self.eps)


class VQMoEAttention(nn.Module):
    """Causal self-attention with rotary positions through PyTorch's fused kernel."""

    def __init__(self, config: VQMoEConfig, block: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.block, self.heads, self.head_width = block, config.num_attention_heads, config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            normed = inner if self.qk_norm == "full" else config.head_dim
            self.q_norm = VQMoERMSNorm(normed, config.rms_norm_eps)
            self.k_norm = VQMoERMSNorm(normed, config.rms_norm_eps)

    def forward(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, past_key_values: Cache | None
    ) -> Tensor:
        heads = (*x_BSD.shape[:2], self.heads, self.head_width)
        q_BSI, k_BSI, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD).view(heads).transpose(1, 2)
        if self.qk_norm == "full":
            q_BSI, k_BSI = self.q_norm(q_BSI), self.k_norm(k_BSI)
        q_BSAH, k_BSAH = q_BSI.view(heads), k_BSI.view(heads)
        if self.qk_norm == "heads":
            q_BSAH, k_BSAH = self.q_norm(q_BSAH), self.k_norm(k_BSAH)
        q, k = _rotate(q_BSAH.transpose(1, 2), rotary), _rotate(k_BSAH.transpose(1, 2), rotary)
        if past_key_values is not None:
            past = past_key_values.get_seq_length(self.block)
            k, v = past_key_values.update(k, v, self.block)
            if k.shape[2] != past + q.shape[2]:  # the mask reckons with no unused places
                raise ValueError("this model needs a cache that grows (DynamicCache), not a static one")
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rotate(x_BASH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x_BASH.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotary(positions_BS: Tensor, config: VQMoEConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``[B, 1, S, H / 2]``; angles in float32 whatever the model's type."""
    halves = torch.arange(0, config.head_dim, 2, device=positions_BS.device, dtype=torch.float32)
    angles = positions_BS[:, None, :, None] * config.rope_theta ** (-halves / config.head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class VQMoEMLP(nn.Module):
    """One dense SwiGLU MLP."""

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VQMoEExperts(nn.Module):
    """The SwiGLU experts of one layer, stacked."""

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_TD: Tensor, expert_ids_TR: Tensor, discrete_offset_TD: Tensor | None) -> Tensor:
        """Outputs of the R experts of each token, ``[T, R, D]``; the offset is added to what the last of them sees."""
        routes = expert_ids_TR.shape[1]
        ids_M = expert_ids_TR.flatten()
        order_M = ids_M.argsort(stable=True)
        inverse_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
        rows_MD = x_TD.index_select(0, order_M // routes)
        if discrete_offset_TD is not None:
            last_M1 = (order_M % routes == routes - 1).unsqueeze(1)
            rows_MD = torch.where(last_M1, rows_MD + discrete_offset_TD[order_M // routes], rows_MD)
        counts_N = torch.bincount(ids_M, minlength=len(self.gate_proj)).tolist()
        return self._run(rows_MD, counts_N).index_select(0, inverse_M).view(-1, routes, x_TD.shape[1])

    def _run(self, rows_MD: Tensor, counts_N: list[int]) -> Tensor:
        """Every row through its expert; rows are sorted by expert."""
        plain = rows_MD.dtype == self.gate_proj.dtype and rows_MD.device.type == "cpu"
        plain = plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
        if plain and compiled is not None and compiled.supports(rows_MD.dtype, *self.gate_proj.shape[:0:-1]):
            return compiled.CompiledExperts.apply(rows_MD, self.gate_proj, self.down_proj, self.up_proj, counts_N)
        # unbind, because indexing under autograd would build a full-size gradient for every expert.
        weights_N = zip(self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
        outputs = [
            F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            for rows, (gate, up, down) in zip(rows_MD.split(counts_N), weights_N, strict=True)
            if len(rows)
        ]
        return torch.cat(outputs)


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
        self.register_buffer("codes", torch.randn(layers, config.num_codes, config.code_dim or width))
        self.register_buffer("code_map", (torch.arange(config.num_codes) % config.num_experts).repeat(layers, 1))
        projection = torch.randn(width, config.code_dim) * width**-0.5 if config.code_dim else None
        self.register_buffer("projection", projection)
        table = torch.zeros(config.vocab_size, width) if config.source_table else None
        self.register_buffer("source_table", table)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> VQMoECodebook:
        """Stay float32 when the model is cast: in bfloat16 codes would send tokens elsewhere. Moves are followed."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                bits = buffer.view(torch.int32) if buffer.is_floating_point() else buffer
                self._buffers[name] = fn(bits).view(buffer.dtype)
        return self

    def compared(self, source_TD: Tensor) -> Tensor:
        """The vectors that are compared with the codes: float32, normalised and projected as configured."""
        z_TC = source_TD.float()
        if self.config.normalize_source:
            z_TC = F.rms_norm(z_TC, z_TC.shape[-1:], eps=1e-6)
        if self.projection is not None:
            z_TC = z_TC @ self.projection
        return F.normalize(z_TC, dim=-1) if self.config.code_distance == "cosine" else z_TC

    @torch.no_grad()
    def nearest(self, layer: int, source_TD: Tensor) -> Tensor:
        """The nearest code of one layer, int64 ``[T]``; ties go to the lowest index."""
        return _half_distances(self.compared(source_TD), self.codes[layer]).argmin(dim=-1)

    @torch.no_grad()
    def experts_of_all_layers(self, source_TD: Tensor) -> Tensor:
        """The expert of the nearest code of every layer, int64 ``[L, T]``."""
        distances = _half_distances(self.compared(source_TD), self.codes.flatten(0, 1))
        codes_LT = distances.view(-1, *self.codes.shape[:2]).argmin(dim=-1).t()
        return self.code_map.gather(1, codes_LT)

    def soft_weight(self, layer: int, x_TD: Tensor) -> Tensor:
        """Softmax probability of the nearest code, ``[T]``, with gradient."""
        distances_TK = torch.cdist(self.compared(x_TD), self.codes[layer]).square()
        return (-distances_TK / self.config.soft_output).softmax(dim=-1).amax(dim=-1)


def _half_distances(z_TC: Tensor, codes_KC: Tensor) -> Tensor:
    """``||v||^2 / 2 - z.v``: orders codes as the squared distance does."""
    return torch.addmm(codes_KC.square().sum(dim=-1) / 2, z_TC, codes_KC.t(), alpha=-1)


class VQMoESparseMLP(nn.Module):
    """Experts under the routers ``vq``, ``topk`` and ``hash_token``.

    ``y = g_c sum_i p_i E_i(x) + g_d E_{map(k)}(q)`` with ``k`` the nearest code, ``g`` the two-way softmax gate and
    ``q = x + c (v_k - x)``; one of the two paths may be missing.
    """

    def __init__(self, config: VQMoEConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        linear = config.router == "topk" or (config.router == "vq" and config.num_experts_per_tok > 0)
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False) if linear else None
        self.path_gate = nn.Linear(config.hidden_size, 2) if linear and config.router == "vq" else None
        self.experts = VQMoEExperts(config)

    def forward(
        self, x_BSD: Tensor, known_T: Tensor | None, codebook: VQMoECodebook | None, kept_BS: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The layer's output and its auxiliary loss (0 outside training), which padding takes no part in."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_TR: Tensor | None
        offset_TD = None
        if self.gate is None:
            ids_TR, weights_TR, offset_TD, aux_loss = self._discrete_route(x_TD, known_T, codebook, kept_BS)
        else:
            ids_TR, linear_TR, aux_loss = self._linear_route(x_TD, self.gate.weight, kept_BS)
            weights_TR = linear_TR
            if self.path_gate is not None:
                ids_T1, soft_T1, offset_TD, commitment = self._discrete_route(x_TD, known_T, codebook, kept_BS)
                gates_T2 = self.path_gate(x_TD).float().softmax(dim=-1)
                discrete_T1 = gates_T2[:, 1:] if soft_T1 is None else gates_T2[:, 1:] * soft_T1
                weights_TR = torch.cat([gates_T2[:, :1] * linear_TR, discrete_T1], dim=1)
                ids_TR = torch.cat([ids_TR, ids_T1], dim=1)
                aux_loss = aux_loss + commitment
        y_TRD = self.experts(x_TD, ids_TR, offset_TD)
        if weights_TR is not None:
            y_TRD = y_TRD * weights_TR.to(y_TRD.dtype).unsqueeze(-1)
        return y_TRD.sum(dim=1).view_as(x_BSD), aux_loss

    def _linear_route(self, x_TD: Tensor, weight_ND: Tensor, kept_BS: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen experts, their weights, and the auxiliary loss."""
        config = self.config
        logits_TN = F.linear(x_TD.float(), weight_ND.float())
        probs_TN = logits_TN.softmax(dim=-1)
        top_probs_TR, ids_TR = probs_TN.topk(config.num_experts_per_tok, dim=-1)
        weights_TR = top_probs_TR
        if config.norm_topk_prob:
            weights_TR = top_probs_TR / top_probs_TR.sum(-1, keepdim=True)
        aux_loss = logits_TN.new_zeros(())
        if self.training:
            logits_TN, probs_TN, chosen_TR = (_kept(t, kept_BS) for t in (logits_TN, probs_TN, ids_TR))
            share_N = torch.bincount(chosen_TR.flatten(), minlength=config.num_experts) / chosen_TR.numel()
            balance = config.num_experts * (share_N * probs_TN.mean(dim=0)).sum()
            z_loss = logits_TN.logsumexp(dim=-1).square().mean()
            aux_loss = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss
        return ids_TR, weights_TR, aux_loss

    def _discrete_route(
        self, x_TD: Tensor, known_T: Tensor | None, codebook: VQMoECodebook | None, kept_BS: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Expert of each token's code, its weight (None: 1), the offset of its input, and the commitment loss."""
        config, soft_T1, offset_TD = self.config, None, None
        commitment = x_TD.new_zeros((), dtype=torch.float32)
        if known_T is not None:
            return known_T.unsqueeze(1), None, None, commitment
        assert codebook is not None
        codes_T = codebook.nearest(self.layer, x_TD)
        if config.code_blend or config.commitment_coef:
            difference_TD = codebook.codes[self.layer][codes_T] - x_TD.float()
            if config.code_blend:
                offset_TD = (config.code_blend * difference_TD.detach()).to(x_TD.dtype)
            if config.commitment_coef and self.training:
                commitment = config.commitment_coef * _kept(difference_TD, kept_BS).square().mean()
        if config.soft_output:
            soft_T1 = codebook.soft_weight(self.layer, x_TD).unsqueeze(1)
        return codebook.code_map[self.layer][codes_T].unsqueeze(1), soft_T1, offset_TD, commitment


def _kept(rows: Tensor, kept_BS: Tensor | None) -> Tensor:
    return rows if kept_BS is None else rows[kept_BS.flatten()]


class VQMoEBlock(GradientCheckpointingLayer):
    """Attention and one feed-forward part, sparse or dense, each on the normalised stream."""

    def __init__(self, config: VQMoEConfig, block: int) -> None:
        super().__init__()
        sparse = block in config.moe_blocks
        self.input_layernorm = VQMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = VQMoEAttention(config, block)
        self.post_attention_layernorm = VQMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = VQMoESparseMLP(config, config.moe_blocks.index(block)) if sparse else VQMoEMLP(config)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        known_T: Tensor | None,
        codebook: VQMoECodebook | None,
        kept_BS: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotary, mask, past_key_values)
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, VQMoESparseMLP):
            y_BSD, aux_loss = self.mlp(normed_BSD, known_T, codebook, kept_BS)
            return x_BSD + y_BSD, aux_loss
        return x_BSD + self.mlp(normed_BSD), None


class VQMoEPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config_class = VQMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VQMoEBlock"]  # noqa: RUF012 (a plain class attribute to transformers)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["codebook.codes", "codebook.projection", "codebook.source_table"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VQMoEExperts):
            for weight in module.parameters():
                nn.init.normal_(weight, std=self.config.initializer_range)


@dataclass
class VQMoEModelOutput(BaseModelOutputWithPast):
    """States of the decoder, its cache, and the auxiliary losses of its routers (0 outside training)."""

    aux_loss: Tensor | None = None


class VQMoEModel(VQMoEPreTrainedModel):
    """The decoder without its output layer."""

    token_table: Tensor | None

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([VQMoEBlock(config, block) for block in range(config.num_hidden_layers)])
        self.norm = VQMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.codebook = VQMoECodebook(config) if config.router == "vq" else None
        table = None
        if config.router == "hash_token":
            table = torch.stack([torch.randperm(config.vocab_size) % config.num_experts for _ in config.moe_blocks])
        self.register_buffer("token_table", table)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,  # past_key_values, as transformers 5.24 and newer call it
        **kwargs: Any,
    ) -> VQMoEModelOutput:
        config = self.config
        past_key_values = past_key_values if cache is None else cache
        x_BSD = self._embedded(input_ids, inputs_embeds)
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask, kept_BS, positions_BS = _masks(x_BSD, attention_mask, position_ids, past)
        rotary = _rotary(positions_BS, config, x_BSD.dtype)
        known = self._routes_ahead(input_ids, x_BSD, positions_BS, kept_BS, past_key_values)
        aux_loss = x_BSD.new_zeros((), dtype=torch.float32)
        states = [x_BSD]
        for index, block in enumerate(self.layers):
            route_T = known.get(index)
            x_BSD, aux = block(x_BSD, rotary, mask, route_T, self.codebook, kept_BS, past_key_values=past_key_values)
            states.append(x_BSD)
            if aux is not None:
                aux_loss = aux_loss + aux
            if config.code_source == "early_block" and index == config.source_block and self.codebook is not None:
                known = self._routes_by_codes(x_BSD, index + 1, config.num_hidden_layers)
        if past_key_values is not None and self._looks_back and input_ids is not None:
            _remember_ids(past_key_values, config.num_hidden_layers, _masked_ids(input_ids, kept_BS))
        last_BSD = self.norm(x_BSD)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return VQMoEModelOutput(
            last_hidden_state=last_BSD,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], last_BSD) if wanted else None,
            aux_loss=aux_loss,
        )

    @property
    def _looks_back(self) -> bool:
        """Whether codes of a token follow from earlier tokens too, whose ids the cache then has to keep."""
        return self.codebook is not None and self.config.code_source == "context" and self.config.context_window > 1

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            return self.embed_tokens(input_ids)
        if self.token_table is not None or self._looks_back or self.config.source_table:
            raise ValueError("the routes of this model follow from token ids: give input_ids, not inputs_embeds")
        assert inputs_embeds is not None
        return inputs_embeds

    def _routes_ahead(
        self,
        input_ids: Tensor | None,
        x_BSD: Tensor,
        positions_BS: Tensor,
        kept_BS: Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[int, Tensor]:
        """Experts that follow from the tokens alone, ``[T]`` by block."""
        config = self.config
        if self.token_table is not None and input_ids is not None:
            return dict(zip(config.moe_blocks, self.token_table[:, input_ids.flatten()], strict=True))
        if self.codebook is None or config.code_source == "layer_state":
            return {}
        if config.code_source == "early_block":  # the blocks up to the source look at the embedding
            return self._routes_by_codes(x_BSD, 0, config.source_block + 1)
        with torch.no_grad():
            if self._looks_back and input_ids is not None:
                source_BSD = self._context(_masked_ids(input_ids, kept_BS), past_key_values)
            else:
                source_BSD = self._vectors(input_ids, x_BSD)
                if config.code_source != "token_embedding":
                    source_BSD = F.rms_norm(source_BSD, source_BSD.shape[-1:], eps=1e-6)
            if config.code_source == "position_embedding":
                source_BSD = source_BSD + config.position_weight * _sinusoids(positions_BS, config.hidden_size)
            return self._routes_by_codes(source_BSD, 0, config.num_hidden_layers)

    def _routes_by_codes(self, source_BSD: Tensor, first_block: int, end_block: int) -> dict[int, Tensor]:
        assert self.codebook is not None
        experts_LT = self.codebook.experts_of_all_layers(source_BSD.detach().flatten(0, 1))
        pairs = zip(self.config.moe_blocks, experts_LT, strict=True)
        return {block: experts_T for block, experts_T in pairs if first_block <= block < end_block}

    def _vectors(self, ids_BS: Tensor | None, embedded_BSD: Tensor) -> Tensor:
        """Float32 embeddings of tokens: the live ones, or those of the codebook's own table."""
        table = None if self.codebook is None else self.codebook.source_table
        return embedded_BSD.float() if table is None or ids_BS is None else F.embedding(ids_BS, table)

    def _context(self, ids_BS: Tensor, past_key_values: Cache | None) -> Tensor:
        """``sum_j decay^j roll(e(x_{t-j}), j)`` over the last W tokens, padding left out, ``[B, S, D]``."""
        config, length, back_most = self.config, ids_BS.shape[1], self.config.context_window - 1
        earlier = _earlier_ids(past_key_values, config.num_hidden_layers, back_most)
        ids = ids_BS if earlier is None else torch.cat([earlier.to(ids_BS.device), ids_BS], dim=1)
        ids = F.pad(ids, (back_most + length - ids.shape[1], 0), value=NO_TOKEN)
        vectors = self._vectors(ids.clamp_min(0), self.embed_tokens(ids.clamp_min(0)))
        unit = F.rms_norm(vectors, vectors.shape[-1:], eps=1e-6) * (ids != NO_TOKEN).unsqueeze(-1)
        mixed_BSD = unit[:, back_most:].clone()
        for back in range(1, config.context_window):
            window = unit[:, back_most - back : back_most - back + length]
            mixed_BSD += config.context_decay**back * torch.roll(window, shifts=back, dims=-1)
        return mixed_BSD


def _masks(
    x_BSD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Mask for attention (None: causal), which new tokens are no padding (None: all), and positions ``[B, S]``.

    Positions count real tokens, so that padding on the left changes nothing.
    """
    batch, length = x_BSD.shape[:2]
    end, device = past + length, x_BSD.device
    if attention_mask is not None and attention_mask.shape != (batch, end):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be [batch, past + new] = {(batch, end)}"
        )
    new = torch.arange(past, end, device=device)
    kept = None if attention_mask is None else attention_mask.bool()
    if position_ids is None:
        position_ids = new.unsqueeze(0) if kept is None else (kept.long().cumsum(1) - 1).clamp_min(0)[:, past:]
    kept_BS = None if kept is None else kept[:, past:]
    if kept is not None and bool(kept.all()):
        kept, kept_BS = None, None
    if kept is None and (past == 0 or length == 1):
        return None, kept_BS, position_ids
    places = torch.arange(end, device=device)
    mask = (places <= new.unsqueeze(1)).expand(batch, 1, length, end)
    if kept is not None:  # padding sees itself, for a softmax over nothing is NaN
        mask = mask & (kept[:, None, None, :] | (places == new.unsqueeze(1)))
    return mask, kept_BS, position_ids


def _sinusoids(positions_BS: Tensor, width: int) -> Tensor:
    """Sinusoidal positions of unit root mean square, ``[B, S, D]``."""
    rates = torch.exp(torch.arange(0, width, 2, device=positions_BS.device) * (-math.log(10000.0) / width))
    angles = positions_BS.unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width] * math.sqrt(2)


def _masked_ids(ids_BS: Tensor, kept_BS: Tensor | None) -> Tensor:
    return ids_BS if kept_BS is None else ids_BS.masked_fill(~kept_BS, NO_TOKEN)


# Ids of past tokens are kept in the cache as one more layer, so that they follow it wherever beam search reorders it,
# speculative decoding crops it, or a batch is expanded.


def _earlier_ids(cache: Cache | None, layers: int, count: int) -> Tensor | None:
    if cache is None or cache.get_seq_length() == 0:
        return None
    if len(cache.layers) <= layers or not cache.layers[layers].is_initialized:
        raise ValueError("the cache holds no token ids, which this model's codes look at: fill it with this model")
    return cache.layers[layers].keys[:, 0, -count:, 0]


def _remember_ids(cache: Cache, layers: int, ids_BS: Tensor) -> None:
    while len(cache.layers) <= layers:
        cache.layers.append(DynamicLayer())
    keys = ids_BS[:, None, :, None]
    cache.layers[layers].update(keys, keys[..., :0])


class VQMoEForCausalLM(VQMoEPreTrainedModel, GenerationMixin):
    """The language model. In training mode the loss includes the auxiliary losses of the routers."""

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__(config)
        self.model = VQMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,  # past_key_values, as transformers 5.24 and newer call it
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits ``[B, S, V]``; with ``labels`` (not shifted, -100 is left out) also the loss."""
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values if cache is None else cache,
            inputs_embeds,
            use_cache,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)  # num_items_in_batch of the Trainer
            if self.training:
                loss = loss + outputs.aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


__all__ = ["VQMoEForCausalLM", "VQMoEModel", "VQMoEPreTrainedModel"]

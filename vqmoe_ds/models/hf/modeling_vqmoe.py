"""The VQMoE language model for Hugging Face ``transformers``: experts chosen by discrete codes.

Exported folders carry this file and the two beside it, which need nothing but torch and transformers.

Legend: B batch, S new tokens, P past tokens in the cache, T = B * S tokens, D width, A heads, K key-value heads,
H width of a head, I = A * H, J = K * H, L MoE layers, V vocabulary, W context window, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_vqmoe import VQMoEConfig
from .routing_vqmoe import Codes, VQMoECodebook, VQMoEExperts, VQMoEMLP, VQMoESparseMLP, source_layer


class VQMoERMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=self.eps)


class VQMoEAttention(nn.Module):
    """Causal self-attention with rotary positions, by the implementation that ``attn_implementation`` names."""

    is_causal = True

    def __init__(self, config: VQMoEConfig, block: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_inner = config.num_key_value_heads * config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.config, self.layer_idx, self.head_dim = config, block, config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_inner, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_inner, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=False)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = VQMoERMSNorm(inner if full else config.head_dim, config.rms_norm_eps)
            self.k_norm = VQMoERMSNorm(kv_inner if full else config.head_dim, config.rms_norm_eps)

    def forward(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Any, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the weights where the implementation knows them."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BSI, k_BSJ, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD).view(heads).transpose(1, 2)
        if self.config.qk_norm == "full":
            q_BSI, k_BSJ = self.q_norm(q_BSI), self.k_norm(k_BSJ)
        q_BSAH, k_BSKH = q_BSI.view(heads), k_BSJ.view(heads)
        if self.config.qk_norm == "heads":
            q_BSAH, k_BSKH = self.q_norm(q_BSAH), self.k_norm(k_BSKH)
        q, k = _rotate(q_BSAH.transpose(1, 2), rotary), _rotate(k_BSKH.transpose(1, 2), rotary)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager_attention)
        options = {"dropout": 0.0, "scaling": self.scaling, "sliding_window": self.config.sliding_window, **kwargs}
        y_BSAH, weights = attend(self, q, k, v, mask, **options)
        return self.o_proj(y_BSAH.reshape(*x_BSD.shape[:2], -1)), weights


def _eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """``attn_implementation="eager"``: ``[B, S, A, H]`` and the weights ``[B, A, S, P + S]``."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


def _rotate(x_BASH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x_BASH.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotary(positions_BS: Tensor, config: VQMoEConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``[B, 1, S, H / 2]``; angles in float32 whatever the model's type."""
    halves = torch.arange(0, config.head_dim, 2, device=positions_BS.device, dtype=torch.float32)
    rates_F, size = config.rope_theta ** (-halves / config.head_dim), 1.0
    if config.rope_scaling_type != "none":
        kept_F = _kept_share(rates_F, config)
        rates_F = rates_F * (kept_F + (1 - kept_F) / config.rope_factor)
        size = 0.1 * math.log(config.rope_factor) + 1 if config.rope_scaling_type == "yarn" else 1.0
    angles = positions_BS[:, None, :, None] * rates_F
    return (angles.cos() * size).to(dtype), (angles.sin() * size).to(dtype)


def _kept_share(rates_F: Tensor, config: VQMoEConfig) -> Tensor:
    """How much of each rotary frequency stays as it was, as its scaling says; the rest is divided by the factor."""
    length = config.rope_original_length
    if config.rope_scaling_type == "linear":
        return torch.zeros_like(rates_F)
    if config.rope_scaling_type == "llama3":
        return ((length * rates_F / (2 * math.pi) - 1) / 3).clamp(0, 1)
    last, first = (
        config.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        for turns in (1, 32)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), config.head_dim - 1)
    places_F = torch.arange(len(rates_F), dtype=torch.float32, device=rates_F.device)
    return 1 - ((places_F - low) / (high - low or 0.001)).clamp(0, 1)


class VQMoEBlock(GradientCheckpointingLayer):
    """Attention and one feed-forward part, sparse or dense, each on the normalised stream."""

    def __init__(self, config: VQMoEConfig, block: int) -> None:
        super().__init__()
        sparse = block in config.moe_blocks
        self.input_layernorm = VQMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = VQMoEAttention(config, block)
        self.post_attention_layernorm = VQMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        layer = config.moe_blocks.index(block) if sparse else 0
        dense = config.hidden_size, config.intermediate_size
        self.mlp = VQMoESparseMLP(config, layer) if sparse else VQMoEMLP(*dense)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Any,
        known_T: Tensor | None,
        codes: Codes,
        kept_BS: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attended_BSD, _ = self.self_attn(self.input_layernorm(x_BSD), rotary, mask, past_key_values, **kwargs)
        x_BSD = x_BSD + attended_BSD
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, VQMoESparseMLP):
            y_BSD, aux_loss, _ = self.mlp(normed_BSD, known_T, codes, kept_BS)
            return x_BSD + y_BSD, aux_loss
        return x_BSD + self.mlp(normed_BSD), None


class VQMoEPreTrainedModel(PreTrainedModel):
    """Loading, saving, initial weights, and vocabularies of another size."""

    config_class = VQMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VQMoEBlock"]  # noqa: RUF012 (a plain class attribute to transformers)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": VQMoEBlock,
        "attentions": VQMoEAttention,
        "router_logits": OutputRecorder(VQMoESparseMLP, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VQMoEExperts):
            module.reset(self.config.initializer_range)
        elif isinstance(module, VQMoECodebook):
            module.reset()
        elif isinstance(module, VQMoEModel):
            module.reset_table()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embedding as every model does, and with it the tables that have a row for each token."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.base_model.resize_tables()
        return embeddings


@dataclass
class VQMoEModelOutput(MoeModelOutputWithPast):
    """States of the decoder, its cache, and in training the auxiliary losses of its routers."""

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
        tables = {} if self.codebook is None else dict(self.codebook.named_buffers())
        self._keep_in_fp32_modules_strict = [f"codebook.{name}" for name, t in tables.items() if t.is_floating_point()]
        shape = len(config.moe_blocks), config.vocab_size
        table = torch.empty(shape, dtype=torch.int64) if config.router == "hash_token" else None
        self.register_buffer("token_table", table)
        self.reset_table()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,  # past_key_values, as transformers 5.24 and newer call it
        **kwargs: Any,
    ) -> VQMoEModelOutput:
        """States of all tokens.

        Args:
            attention_mask: ``[B, P + S]``, 0 for padding, which changes nothing on either side; or which tokens see
                which, ``[B, 1, S, P + S]``, true or 0 where they do.
            position_ids: ``[B, S]``; by default real tokens are counted. Where they start anew in a batch without
                cache and mask, as packed documents do, the documents do not see each other.
        """
        config, past_key_values = self.config, past_key_values if cache is None else cache
        x_BSD = self._embedded(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        first = 0 if past_key_values is None else past_key_values.get_mask_sizes(x_BSD.shape[1], 0)[1]
        seen = _Seen(x_BSD, attention_mask, position_ids, past, first)
        cached = past_key_values if seen.documents_BS is None else None  # transformers looks for documents without one
        make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
        mask = make_mask(config, x_BSD, attention_mask, cached, position_ids=seen.positions_BS)
        rotary = _rotary(seen.positions_BS, config, x_BSD.dtype)
        known = self._routes_ahead(input_ids, x_BSD, seen, past_key_values)
        aux_loss = x_BSD.new_zeros((), dtype=torch.float32)
        for index, block in enumerate(self.layers):
            routes = (known.get(index), self._codes, seen.kept_BS)
            x_BSD, aux = block(x_BSD, rotary, mask, *routes, past_key_values=past_key_values, **kwargs)
            if aux is not None:
                aux_loss = aux_loss + aux.to(aux_loss.device)
            if config.code_source == "early_block" and index == config.source_block and self.codebook is not None:
                known = self._routes_by_codes(x_BSD, index + 1, config.num_hidden_layers)
        return VQMoEModelOutput(
            last_hidden_state=self.norm(x_BSD),
            past_key_values=past_key_values,
            aux_loss=aux_loss if self.training else None,
        )

    @torch.no_grad()
    def reset_table(self) -> None:
        """Experts by token id; always alike, so that all processes start from one model."""
        if self.token_table is not None:
            generator = torch.Generator().manual_seed(0)
            layers, length = self.token_table.shape
            drawn = [torch.randperm(length, generator=generator, device="cpu") for _ in range(layers)]
            init.copy_(self.token_table, torch.stack(drawn) % self.config.num_experts)

    @torch.no_grad()
    def resize_tables(self) -> None:
        """Give every table that token ids look into the length of the embedding.

        New tokens take turns among the experts, and are to the codes what their embedding is.
        """
        length = self.config.vocab_size
        if self.token_table is not None:
            old = self.token_table.shape[1]
            more = torch.arange(old, max(old, length), device=self.token_table.device)
            more_LV = (more % self.config.num_experts).expand(len(self.token_table), -1)
            self.token_table = torch.cat([self.token_table[:, :length], more_LV], dim=1)
        if self.codebook is not None and self.codebook.source_table is not None:
            table_VD = self.codebook.source_table
            new = torch.arange(len(table_VD), max(len(table_VD), length), device=self.device)
            self.codebook.source_table = torch.cat([table_VD[:length], self.embed_tokens(new).to(table_VD)])

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            return self.embed_tokens(input_ids)
        if self.token_table is not None or self.config.source_table:
            raise ValueError("the routes of this model follow from token ids: give input_ids, not inputs_embeds")
        assert inputs_embeds is not None
        return inputs_embeds

    # ---------------------------------------------------------------- routes

    def _codes(self, source: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert self.codebook is not None
        return self.codebook(source, layer)

    def _routes_ahead(
        self, input_ids: Tensor | None, x_BSD: Tensor, seen: _Seen, past_key_values: Cache | None
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
            source_BSD = x_BSD.float() if input_ids is None or not config.source_table else self._codes(input_ids)[0]
            if config.code_source != "token_embedding":
                source_BSD = F.rms_norm(source_BSD, source_BSD.shape[-1:], eps=1e-6)
            if config.code_source == "position_embedding":
                sinusoids_BSD = _sinusoids(seen.positions_BS, config.hidden_size)
                source_BSD = source_BSD + config.position_weight * sinusoids_BSD
            if config.code_source == "context" and config.context_window > 1:
                source_BSD = self._context(source_BSD, seen, past_key_values)
            return self._routes_by_codes(source_BSD, 0, config.num_hidden_layers)

    def _routes_by_codes(self, source_BSD: Tensor, first_block: int, end_block: int) -> dict[int, Tensor]:
        experts_LT = self._codes(source_BSD.detach().flatten(0, 1))[0]
        pairs = zip(self.config.moe_blocks, experts_LT, strict=True)
        return {block: experts_T for block, experts_T in pairs if first_block <= block < end_block}

    def _context(self, unit_BSD: Tensor, seen: _Seen, past_key_values: Cache | None) -> Tensor:
        """``sum_j decay^j roll(u_{t-j}, j)`` over those of the last W tokens that a token sees, ``[B, S, D]``."""
        if seen.kept_BS is not None:
            unit_BSD = unit_BSD * seen.kept_BS.unsqueeze(-1)
        earlier = unit_BSD
        if past_key_values is not None:
            earlier = source_layer(past_key_values, self.config.sliding_window is not None).remember(unit_BSD)
        mixed_BSD = unit_BSD.clone()
        for back in range(1, self.config.context_window):
            places_S = (seen.places_S - back).clamp_min(0)
            window_BSD = earlier.index_select(1, places_S) * seen.back(back).unsqueeze(-1)
            mixed_BSD += self.config.context_decay**back * torch.roll(window_BSD, shifts=back, dims=-1)
        return mixed_BSD


class _Seen:
    """The tokens of one call, and the earlier ones that they see.

    Attributes:
        places_S: where the new tokens stand among all.
        positions_BS: of the rotary embedding.
        kept_BS: false for padding; None where nothing tells of padding.
        documents_BS: number of the packed document of each token; None where there is one.
        mask_BSP: which tokens see which, where that was given; its first column is token ``first``, before which a
            cache with a sliding window has forgotten all.

    Raises:
        ValueError: the mask has another shape than the tokens.
    """

    def __init__(
        self, x_BSD: Tensor, attention_mask: Any, position_ids: Tensor | None, past: int | Tensor, first: int = 0
    ) -> None:
        batch, length = x_BSD.shape[:2]
        self.first = first
        self.places_S = torch.arange(length, device=x_BSD.device) + past
        self.kept_BS: Tensor | None = None
        self.documents_BS: Tensor | None = None
        self.mask_BSP: Tensor | None = None
        self.unknown = False
        positions_BS = self.places_S.unsqueeze(0)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
            mask_BSP = attention_mask[:, 0]
            self.mask_BSP = mask_BSP if mask_BSP.dtype == torch.bool else mask_BSP > torch.finfo(mask_BSP.dtype).min / 2
            self.kept_BS = self._in_mask(0).expand(batch, length)
        elif isinstance(attention_mask, Tensor):
            if not torch.compiler.is_compiling() and attention_mask.shape != (batch, int(past) + length):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; it must be [batch, past + new] = "
                    f"{(batch, int(past) + length)} or [batch, 1, new, past + new]"
                )
            kept = attention_mask.to(x_BSD.device).bool()
            self.kept_BS = kept[:, -length:]
            positions_BS = (kept.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
        elif attention_mask is not None:  # of flex attention, which looks at it alone
            self.unknown = True
        elif position_ids is not None and isinstance(past, int) and past == 0:
            self.documents_BS = find_packed_sequence_indices(position_ids)
        self.positions_BS = positions_BS if position_ids is None else position_ids

    def back(self, steps: int) -> Tensor:
        """Whether each token sees the one ``steps`` before it, padding aside, ``[1 or B, S]``."""
        if self.unknown:
            raise ValueError(
                "this model's codes look back at the tokens that a token sees: give a mask that is a tensor"
            )
        there = (self.places_S >= steps).unsqueeze(0)
        if self.mask_BSP is not None and self.first > 0 and self.mask_BSP.shape[2] - len(self.places_S) < steps:
            raise ValueError(
                "this model's codes look back further than its sliding window, and a mask [batch, 1, new, past + new] "
                "tells nothing of what the cache has forgotten: use a DynamicCache and a mask [batch, past + new]"
            )
        if self.mask_BSP is not None:
            return there & self._in_mask(steps)
        if self.documents_BS is not None:
            return there & (self.documents_BS == self.documents_BS.roll(steps, dims=1))
        return there

    def _in_mask(self, steps: int) -> Tensor:
        assert self.mask_BSP is not None
        places_1S1 = (self.places_S - steps - self.first).clamp_min(0).view(1, -1, 1)
        return self.mask_BSP.gather(2, places_1S1.expand(len(self.mask_BSP), -1, 1)).squeeze(2)


def _sinusoids(positions_BS: Tensor, width: int) -> Tensor:
    """Sinusoidal positions of unit root mean square, ``[B, S, D]``."""
    rates = torch.exp(torch.arange(0, width, 2, device=positions_BS.device) * (-math.log(10000.0) / width))
    angles = positions_BS.unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width] * math.sqrt(2)


def _share(labels: Tensor, num_items_in_batch: Any) -> Any:
    """Factor of an auxiliary loss where the Trainer adds up parts of a batch: this part's share of its labels."""
    if num_items_in_batch is None:
        return 1.0
    return labels.ne(-100).sum() / torch.as_tensor(num_items_in_batch, device=labels.device)


class VQMoEForCausalLM(VQMoEPreTrainedModel, GenerationMixin):
    """The language model. In training mode the loss includes the auxiliary losses of the routers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

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
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)  # num_items_in_batch of the Trainer
            if self.training:
                targets = kwargs.get("shift_labels")
                targets = labels[..., 1:] if targets is None else targets
                share = _share(targets, kwargs.get("num_items_in_batch"))
                loss = loss + (outputs.aux_loss * share).to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class VQMoEForSequenceClassification(VQMoEPreTrainedModel):
    """A classifier of texts: a linear head over the pooled states, as ``config.classifier_pool`` says."""

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = VQMoEModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
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
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits ``[B, C]``; padding is what ``attention_mask`` says, or without one ``pad_token_id`` at either end."""
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = _without_padding(input_ids.ne(self.config.pad_token_id))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self._pooled(outputs.last_hidden_state, attention_mask)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            if self.training:
                single = self.config.problem_type == "single_label_classification"  # the others are means of each part
                share = _share(labels, kwargs.get("num_items_in_batch") if single else None)
                loss = loss + outputs.aux_loss * share
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pooled(self, states_BSD: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The mean of the real tokens' states, or the last of them, ``[B, D]``."""
        batch, length = states_BSD.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, length, device=states_BSD.device)
        if attention_mask.dim() != 2:
            raise ValueError("a classifier pools the tokens that attention_mask [batch, tokens] keeps: give that one")
        real_BS = attention_mask[:, -length:].to(states_BSD.device).bool()
        if self.config.classifier_pool == "last":
            last_B = (real_BS * torch.arange(length, device=real_BS.device)).argmax(dim=1)
            return states_BSD[torch.arange(batch, device=real_BS.device), last_B]
        sums_BD = states_BSD.float().masked_fill(~real_BS.unsqueeze(-1), 0.0).sum(dim=1)
        return (sums_BD / real_BS.sum(dim=1, keepdim=True)).to(states_BSD.dtype)


def _without_padding(other_BS: Tensor) -> Tensor:
    """Mask of the tokens from the first that is no padding to the last; all of a text that is nothing else."""
    inside = other_BS.cumsum(1).bool() & other_BS.flip(1).cumsum(1).bool().flip(1)
    return (inside | ~other_BS.any(dim=1, keepdim=True)).long()


__all__ = [
    "VQMoEForCausalLM",
    "VQMoEForSequenceClassification",
    "VQMoEModel",
    "VQMoEPreTrainedModel",
]

"""The VQMoE language model for Hugging Face ``transformers``: experts chosen by discrete codes.

Exported folders carry this file and those beside it, which need nothing but torch and transformers.

Legend: B batch, S new tokens, P past tokens in the cache, T = B * S tokens, D width, L MoE layers,
V vocabulary, W context window, C classes.
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
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_vqmoe import SeenTokens, VQMoEAttention, VQMoERMSNorm, rotary_tables, sinusoids
from .configuration_vqmoe import WITH_CODES, WITH_TABLE, VQMoEConfig
from .routing_vqmoe import (
    ALL_EXPERTS_FUNCTIONS,
    Codes,
    VQMoECodebook,
    VQMoEExperts,
    VQMoEMLP,
    VQMoESparseMLP,
    source_layer,
)


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
    # By place in what `forward` returns: states 0 and attention weights 1, transformers' defaults, and router logits 2.
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

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The name of the experts' products (``VQMoEExperts``); none: ``eager``, the trainer's.

        Raises:
            ValueError: any other name.
        """
        if requested_experts in (None, "eager"):
            return "eager"
        if requested_experts not in ALL_EXPERTS_FUNCTIONS:
            known = ", ".join(["eager", *ALL_EXPERTS_FUNCTIONS])
            raise ValueError(f"experts_implementation={requested_experts!r} is none of {known}")
        return requested_experts

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
        self.codebook = VQMoECodebook(config) if config.router in WITH_CODES else None
        tables = {} if self.codebook is None else dict(self.codebook.named_buffers())
        # `from_pretrained(dtype=...)` casts tensors as it loads them, past `VQMoECodebook._apply`; strict: to bfloat16,
        # too.
        self._keep_in_fp32_modules_strict = [f"codebook.{name}" for name, t in tables.items() if t.is_floating_point()]
        # hash_ngrams has a table for every place of every window.
        places = [config.ngrams * (config.ngrams + 1) // 2] if config.router == "hash_ngrams" else []
        shape = len(config.moe_blocks), *places, config.vocab_size
        table = torch.empty(shape, dtype=torch.int64) if config.router in WITH_TABLE else None
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
        if past_key_values is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # transformers drops it block by block, and 5.24 looks for another name than 5.23: a block that runs again
            # in backward would add its keys twice.
            if past_key_values.get_seq_length():
                raise ValueError(
                    "gradient checkpointing cannot go on from a cache of earlier tokens: give the whole text at once, "
                    "or call gradient_checkpointing_disable()"
                )
            past_key_values = None
        x_BSD = self._embedded(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        first = 0 if past_key_values is None else past_key_values.get_mask_sizes(x_BSD.shape[1], 0)[1]
        seen = SeenTokens(x_BSD, attention_mask, position_ids, past, first)
        cached = past_key_values if seen.documents_BS is None else None  # transformers looks for documents without one
        make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
        mask = make_mask(config, x_BSD, attention_mask, cached, position_ids=seen.positions_BS)
        rotary = rotary_tables(seen.positions_BS, config, x_BSD.dtype)
        known = self._routes_ahead(input_ids, x_BSD, seen, past_key_values)
        aux_loss = x_BSD.new_zeros((), dtype=torch.float32)
        for index, block in enumerate(self.layers):
            routes = (known.get(index), self._codes, seen.kept_BS)
            x_BSD, aux = block(x_BSD, rotary, mask, *routes, past_key_values=past_key_values, **kwargs)
            if aux is not None:
                # A device map may put blocks on several devices.
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
            *shape, length = self.token_table.shape
            drawn = [torch.randperm(length, generator=generator, device="cpu") for _ in range(math.prod(shape))]
            init.copy_(self.token_table, torch.stack(drawn).view_as(self.token_table) % self.config.num_experts)

    @torch.no_grad()
    def resize_tables(self) -> None:
        """Give every table that token ids look into the length of the embedding.

        New tokens take turns among the experts, and are to the codes what their embedding is.
        """
        length = self.config.vocab_size
        if self.token_table is not None:
            *shape, old = self.token_table.shape
            more = torch.arange(old, max(old, length), device=self.token_table.device)
            more_LV = (more % self.config.num_experts).expand(*shape, -1)
            self.token_table = torch.cat([self.token_table[..., :length], more_LV], dim=-1)
        if self.codebook is not None and self.codebook.source_table is not None:
            table_VD = self.codebook.source_table
            new = torch.arange(len(table_VD), max(len(table_VD), length), device=self.device)
            # The embedding is called and not indexed: offloaded weights are in memory only while their module runs.
            self.codebook.source_table = torch.cat([table_VD[:length], self.embed_tokens(new).to(table_VD)])

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None and not input_ids.shape[1]:
            raise ValueError("a text of no tokens was given: give at least one, such as that which ends a document")
        if input_ids is not None:
            return self.embed_tokens(input_ids)
        if self.token_table is not None or self.config.source_table:
            raise ValueError("the routes of this model follow from token ids: give input_ids, not inputs_embeds")
        assert inputs_embeds is not None
        return inputs_embeds

    # ---------------------------------------------------------------- routes

    def _codes(self, source: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert self.codebook is not None
        with maybe_autocast(source.device.type, enabled=False):  # in bfloat16 codes would send tokens elsewhere
            return self.codebook(source, layer)

    def _routes_ahead(
        self, input_ids: Tensor | None, x_BSD: Tensor, seen: SeenTokens, past_key_values: Cache | None
    ) -> dict[int, Tensor]:
        """Experts that follow from the tokens alone by block, ``[T]``, or where they are several ``[T, R]``."""
        codes = self._codes_ahead(input_ids, x_BSD, seen, past_key_values)
        if self.token_table is None or input_ids is None:
            return codes
        if self.config.router == "hash_ngrams":
            experts = self._experts_of_ngrams(input_ids, seen, past_key_values)
        else:
            experts = self.token_table[:, input_ids.flatten()]
        table = dict(zip(self.config.moe_blocks, experts, strict=True))
        return {
            block: torch.stack([table[block], codes[block].to(table[block].device)], -1) for block in codes
        } or table

    def _codes_ahead(
        self, input_ids: Tensor | None, x_BSD: Tensor, seen: SeenTokens, past_key_values: Cache | None
    ) -> dict[int, Tensor]:
        """Experts by codes that look at embeddings, ``[T]`` by block."""
        config = self.config
        if self.codebook is None or config.code_source == "layer_state":
            return {}
        if config.code_source == "early_block":  # the blocks up to the source look at the embedding
            return self._routes_by_codes(x_BSD, 0, config.source_block + 1)
        with torch.no_grad():
            # As the trainer's `EmbeddingSource` and `mix_context` compute it, operation by operation: by another
            # rounding tokens half-way between two codes would go to the other.
            source_BSD = x_BSD.float() if input_ids is None or not config.source_table else self._codes(input_ids)[0]
            if config.code_source != "token_embedding":
                source_BSD = F.rms_norm(source_BSD, source_BSD.shape[-1:], eps=1e-6)
            if config.code_source == "position_embedding":
                sinusoids_BSD = sinusoids(seen.positions_BS, config.hidden_size)
                source_BSD = source_BSD + config.position_weight * sinusoids_BSD
            if config.code_source == "context" and config.context_window > 1:
                source_BSD = self._context(source_BSD, seen, past_key_values)
            return self._routes_by_codes(source_BSD, 0, config.num_hidden_layers)

    def _routes_by_codes(self, source_BSD: Tensor, first_block: int, end_block: int) -> dict[int, Tensor]:
        experts_LT = self._codes(source_BSD.detach().flatten(0, 1))[0]
        pairs = zip(self.config.moe_blocks, experts_LT, strict=True)
        return {block: experts_T for block, experts_T in pairs if first_block <= block < end_block}

    def _context(self, unit_BSD: Tensor, seen: SeenTokens, past_key_values: Cache | None) -> Tensor:
        """``sum_j decay^j roll(u_{t-j}, j)`` over those of the last W tokens that a token sees, ``[B, S, D]``."""
        if seen.kept_BS is not None:
            unit_BSD = unit_BSD * seen.kept_BS.unsqueeze(-1)
        earlier, mixed_BSD = self._with_earlier(unit_BSD, past_key_values), unit_BSD.clone()
        for back in range(1, self.config.context_window):
            window_BSD = seen.before(earlier, back) * seen.back(back).unsqueeze(-1)
            mixed_BSD += self.config.context_decay**back * torch.roll(window_BSD, shifts=back, dims=-1)
        return mixed_BSD

    def _experts_of_ngrams(self, input_ids: Tensor, seen: SeenTokens, past_key_values: Cache | None) -> Tensor:
        """``(sum_j T_{n,j}[token_{t-j}]) mod N`` over those of the last n tokens that a token sees, ``[L, T, R]``."""
        assert self.token_table is not None
        # Ids count from 1 here: 0 is padding, as in the vectors of `_context`.
        numbers_BS = input_ids + 1 if seen.kept_BS is None else (input_ids + 1) * seen.kept_BS
        # A cache need not keep what no hash looks back at.
        cache, sums = past_key_values if self.config.ngrams > 1 else None, []
        earlier = self._with_earlier(numbers_BS.unsqueeze(-1), cache)
        backs = range(1, self.config.ngrams)
        numbers = [seen.before(earlier, back).squeeze(-1) * seen.back(back) for back in backs]
        for last in range(self.config.ngrams):
            tables = self.token_table[:, last * (last + 1) // 2 :]
            sum_LBS = tables[:, 0][:, input_ids]
            for back, numbers_BS in enumerate(numbers[:last], 1):
                sum_LBS = sum_LBS + tables[:, back][:, (numbers_BS - 1).clamp_min(0)] * numbers_BS.gt(0)
            sums.append(sum_LBS)
        return torch.stack(sums, dim=-1).flatten(1, 2) % self.config.num_experts

    def _with_earlier(self, new_BSD: Tensor, past_key_values: Cache | None) -> Tensor:
        """What is known of the tokens, after what the cache holds of those before: ``[B, P + S, D]``, or more."""
        if past_key_values is None:
            return new_BSD
        return source_layer(past_key_values, self.config.sliding_window is not None).remember(new_BSD)


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
        # transformers' `resize_token_embeddings` writes this attribute, and the loss below reads it.
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
        # 0 keeps all, for -0 is 0.
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
        return (sums_BD / real_BS.sum(dim=1, keepdim=True).clamp_min(1)).to(states_BSD.dtype)


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

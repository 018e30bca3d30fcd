"""Configuration of the VQMoE language model for Hugging Face ``transformers``."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

ROUTERS = ("vq", "topk", "hash_token", "hash_and_code", "hash_ngrams", "dense")
WITH_CODES, WITH_TABLE = ("vq", "hash_and_code"), ("hash_token", "hash_and_code", "hash_ngrams")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
QK_NORMS = ("none", "heads", "full")
POOLS = ("mean", "last")
AHEAD = ("token_embedding", "position_embedding", "context")
"""Code sources from which the experts of all layers follow before the first block."""
CODE_SOURCES = ("layer_state", "early_block", *AHEAD)


class VQMoEConfig(PretrainedConfig):
    """A pre-norm decoder whose experts are chosen by discrete codes, by a linear router, or by both.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, rope_theta, rms_norm_eps:
            as in Llama.
        head_dim: width of an attention head; None: ``hidden_size / num_attention_heads``.
        rope_scaling_type: ``none``, or how frequencies are slowed down: ``linear``, ``llama3`` or ``yarn``.
        rope_factor: how many times slower the slowest turn.
        rope_original_length: of ``llama3`` and ``yarn``: context that the frequencies were learned at.
        qk_norm: RMSNorm of queries and keys: ``none``, ``heads`` (each head alone) or ``full`` (all heads together).
        qkv_bias: whether queries, keys and values have a bias.
        max_position_embeddings: length of the training context.
        sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it, as in Mistral; None: all
            before it.
        intermediate_size: hidden width of the dense MLPs.
        moe_intermediate_size: hidden width of one expert.
        moe_every: an MoE layer in every n-th block (1: all, 2: every second).
        first_k_dense_replace: first blocks that have none.
        router: ``vq`` (codes, beside a linear router where ``num_experts_per_tok`` > 0), ``topk``, ``hash_token``
            (experts from a table of token ids), ``hash_and_code`` (one by the table, one by the code), ``hash_ngrams``
            (one by a hash of the token, one by a hash of it and the one before, and so on) or ``dense`` (no experts).
        ngrams: experts of each token under ``hash_ngrams``.
        pair_gate: whether the experts of ``hash_and_code`` and ``hash_ngrams`` are weighted by a softmax of the token's
            state.
        expert_input_norm: whether the expert of the code sees a LayerNorm of its input (router ``vq``).
        expert_output_norm: whether a LayerNorm follows every expert; with ``vq`` that of the code alone.
        num_experts: experts of a layer.
        n_shared_experts: experts beside them that every token passes, as one MLP of their widths together.
        shared_expert_gate: whether they are weighted by a sigmoid of the token's state.
        num_experts_per_tok: experts of the linear router for each token; 0 with ``vq``: the code alone decides.
        norm_topk_prob: whether the weights of the linear router's experts sum to 1, or are their probabilities among
            all experts; None: the latter for a single expert alone.
        code_blend: c in ``q = x + c (v - x)``, what the expert of the code sees.
        num_codes: codes of a layer.
        code_groups: groups of experts; a token has one group in all layers, that of the expert that its code of the
            first layer names (sources of embeddings alone).
        code_source: the vector that is compared with the codes.
        context_window, context_decay: of the source ``context``.
        position_weight: of the source ``position_embedding``.
        source_block: of the source ``early_block``.
        source_table: whether the sources made of embeddings look at a table of their own instead of the live one.
        normalize_source: scale source vectors to unit root mean square.
        code_dim: width of the fixed projection of source vectors; 0: none.
        code_distance: ``euclidean`` or ``cosine``.
        soft_output: temperature of the weight of the code's expert (source ``layer_state``); 0: off.
        router_aux_loss_coef, router_z_loss_coef, commitment_coef: weights of the losses that training adds.
        classifier_pool: what a text is classified by: the ``mean`` of its tokens' states, or the ``last`` one.
        output_router_logits: return the logits of the linear routers.
        pad_token_id, bos_token_id, eos_token_id: None where the tokenizer has none.

    Raises:
        ValueError: an option has a value that the model does not know.
    """

    model_type = "vqmoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (a plain class attribute to transformers)

    vocab_size: int = 257
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = None  # type: ignore[assignment]  # these three are filled in below
    head_dim: int = None  # type: ignore[assignment]
    qk_norm: str = "none"
    qkv_bias: bool = False
    max_position_embeddings: int = 256
    sliding_window: int | None = None
    rope_theta: float = 10000.0
    rope_scaling_type: str = "none"
    rope_factor: float = 1.0
    rope_original_length: int = 0
    rms_norm_eps: float = 1e-6
    intermediate_size: int = 384
    moe_intermediate_size: int = 192
    moe_every: int = 1
    first_k_dense_replace: int = 0
    router: str = "vq"
    num_experts: int = 16
    n_shared_experts: int = 0
    shared_expert_gate: bool = False
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = None  # type: ignore[assignment]
    ngrams: int = 2
    pair_gate: bool = True
    expert_input_norm: bool = False
    expert_output_norm: bool = False
    code_blend: float = 0.0
    num_codes: int = 16
    code_groups: int = 1
    code_source: str = "context"
    context_window: int = 3
    context_decay: float = 0.5
    position_weight: float = 0.5
    source_block: int = 0
    source_table: bool = False
    normalize_source: bool = True
    code_dim: int = 0
    code_distance: str = "euclidean"
    soft_output: float = 0.0
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    commitment_coef: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    classifier_pool: str = "mean"
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value, known in (
            ("router", self.router, ROUTERS),
            ("qk_norm", self.qk_norm, QK_NORMS),
            ("rope_scaling_type", self.rope_scaling_type, ROPE_SCALINGS),
            ("code_source", self.code_source, CODE_SOURCES),
            ("code_distance", self.code_distance, ("euclidean", "cosine")),
            ("classifier_pool", self.classifier_pool, POOLS),
            # Options of Llama and its like that would change what is computed, and that this model lacks.
            ("layer_types", kwargs.get("layer_types"), (None,)),
            ("rope_scaling", _scaling(kwargs.get("rope_scaling") or kwargs.get("rope_parameters")), ("default",)),
            ("rope_parameters.rope_theta", _theta(kwargs.get("rope_parameters")), (None, self.rope_theta)),
            ("partial_rotary_factor", kwargs.get("partial_rotary_factor", 1.0), (1.0,)),
            ("attention_dropout", kwargs.get("attention_dropout", 0.0), (0.0,)),
            ("attention_bias", kwargs.get("attention_bias", False), (False,)),
            ("mlp_bias", kwargs.get("mlp_bias", False), (False,)),
            ("hidden_act", kwargs.get("hidden_act", "silu"), ("silu",)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, known))}")
        grouped, ahead = self.code_groups > 1, self.code_source in AHEAD
        if self.router == "vq" and (self.num_experts % self.code_groups or (grouped and not ahead)):
            raise ValueError(
                f"code_groups={self.code_groups} must divide num_experts={self.num_experts}, and needs code_source to "
                f"be one of {', '.join(AHEAD)}; it is {self.code_source}"
            )
        if self.router == "hash_and_code" and (not ahead or grouped):
            raise ValueError(
                f"router='hash_and_code' needs code_groups=1 and code_source to be one of {', '.join(AHEAD)}; they are "
                f"{self.code_groups} and {self.code_source}"
            )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % (kv_heads or heads):
            raise ValueError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok != 1
        self._check_sizes()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        """Raises: ValueError: a size that this router, code source or scaling looks at cannot be."""
        sparse, codes, most = self.router != "dense", self.router in WITH_CODES, math.inf
        early = codes and self.code_source == "early_block"
        for name, low, high, matters in (
            ("sliding_window", 1, most, self.sliding_window is not None),
            ("rope_factor", 1, most, self.rope_scaling_type != "none"),
            ("rope_original_length", 1, most, self.rope_scaling_type in ("llama3", "yarn")),
            ("moe_every", 1, most, sparse),
            ("num_experts", 1, most, sparse),
            ("num_experts_per_tok", 0 if codes else 1, self.num_experts, self.router in ("vq", "topk")),
            ("num_codes", 1, most, codes),
            ("code_dim", 0, most, codes),
            ("context_window", 1, most, codes),
            ("source_block", 0, self.num_hidden_layers - 1, early),
            ("ngrams", 1, 8, self.router == "hash_ngrams"),
        ):
            value, kinds = getattr(self, name), (int, float) if name.startswith("rope") else int
            fits = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
            if matters and not fits:
                upwards = f"from {low} to {high}" if high < most else f"{low} or more"
                raise ValueError(f"{name}={value!r} must be {'a whole number, ' * (kinds is int)}{upwards}")
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if sparse and not self.moe_blocks:
            raise ValueError(
                f"moe_every={self.moe_every} and first_k_dense_replace={self.first_k_dense_replace} leave none of "
                f"{self.num_hidden_layers} blocks with experts: take router='dense', or more blocks"
            )

    @property
    def moe_blocks(self) -> list[int]:
        """Indices of the blocks with experts."""
        if self.router == "dense":
            return []
        every = range(self.moe_every - 1, self.num_hidden_layers, self.moe_every)
        return [block for block in every if block >= self.first_k_dense_replace]


def _theta(rope: dict[str, Any] | None) -> Any:
    return (rope or {}).get("rope_theta")


def _scaling(rope: dict[str, Any] | None) -> str:
    """Scaling of rotary positions."""
    return str((rope or {}).get("rope_type", (rope or {}).get("type", "default")))

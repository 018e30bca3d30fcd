"""Sections of the run configuration that describe a model: the transformer, its experts, their codes."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from vqmoe_ds.config.fields import (
    LARGEST_WEIGHT,
    MOST_CODES,
    MOST_EXPERTS,
    MOST_FEATURES,
    MOST_IDS,
    MOST_LAYERS,
    MOST_STEPS,
    MOST_TOGETHER,
    MOST_TOKENS,
    Section,
    option,
)
from vqmoe_ds.config.routers import RouterFacts, router_class


class SoftmaxOver(StrEnum):
    AUTO = "auto"
    CHOSEN = "chosen"
    ALL = "all"


class CodeSource(StrEnum):
    """Values of ``codebook.source``, the vector that is compared with the codes (docs/layer.md has the formulas).

    Examples:
        >>> from vqmoe_ds.moe import CodebookConfig, CodeSource
        >>> CodebookConfig(source="layer_state").source is CodeSource.LAYER_STATE
        True
    """

    LAYER_STATE = "layer_state"
    TOKEN_EMBEDDING = "token_embedding"
    POSITION_EMBEDDING = "position_embedding"
    CONTEXT = "context"
    EARLY_BLOCK = "early_block"
    PATCH = "patch"


class QKNorm(StrEnum):
    NONE = "none"
    HEADS = "heads"
    FULL = "full"


class RopeScaling(StrEnum):
    """Values of ``model.rope_scaling``, by the names that ``transformers`` has for them."""

    NONE = "none"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


class CodeMap(StrEnum):
    MOD = "mod"
    BALANCED = "balanced"


class Stem(StrEnum):
    PATCH = "patch"
    CONV = "conv"


class ModelConfig(Section):
    """The transformer around the experts: pre-norm decoder, RMSNorm, rotary positions, causal SDPA attention.

    With ``image_size`` it classifies images: tokens are patches with learned positions, and all see each other.
    """

    vocab_size: int = option(
        256,
        "size of the vocabulary, of images the number of classes; unless set, that of the data",
        "tokens",
        ge=2,
        le=MOST_IDS,
    )
    layers: int = option(4, "transformer blocks", ge=1, le=MOST_LAYERS)
    width: int = option(128, "model width d", "features", ge=2, le=MOST_FEATURES)
    heads: int = option(4, "attention heads; must divide the width unless head_width is set", ge=1, le=MOST_FEATURES)
    kv_heads: int = option(
        0,
        "key-value heads, each shared by equally many query heads (grouped-query attention); 0: as many as heads",
        ge=0,
        le=MOST_FEATURES,
    )
    qkv_bias: bool = option(False, "add a learned bias to queries, keys and values (Qwen 2)")
    head_width: int = option(0, "width of an attention head; 0: width / heads", "features", ge=0, le=MOST_FEATURES)
    qk_norm: QKNorm = option(
        QKNorm.NONE, "RMSNorm of queries and keys: none, heads (each head alone, Qwen 3) or full (all together, OLMoE)"
    )
    sequence_length: int = option(256, "training context", "tokens", ge=2, le=MOST_TOKENS)
    sliding_window: int = option(
        0,
        "sliding-window attention: the last tokens that a token sees, itself included (Mistral); 0: all before it",
        "tokens",
        ge=0,
        le=MOST_TOKENS,
    )
    tie_embeddings: bool = option(False, "the output head shares the weight of the embedding (tied embeddings)")
    moe_every: int = option(
        1, "an MoE layer in every n-th block (1: all, 2: every second)", "blocks", ge=1, le=MOST_LAYERS
    )
    dense_layers: int = option(
        0,
        "first blocks that have no MoE layer, whatever moe_every says (first-k-dense)",
        "blocks",
        ge=0,
        le=MOST_LAYERS,
    )
    dense_hidden: int = option(
        0,
        "hidden width of the dense MLPs; 0: that of all experts of a token, shared ones included",
        "features",
        ge=0,
        le=MOST_FEATURES,
    )
    rope_theta: float = option(10000.0, "base of the rotary frequencies", gt=0, le=1e12)
    rope_scaling: RopeScaling = option(
        RopeScaling.NONE,
        "how rotary frequencies are slowed down for a longer context: none, linear (all alike), llama3 (Llama 3.1) or "
        "yarn (Peng 2023)",
    )
    rope_factor: float = option(1.0, "rope_scaling: how many times slower the slowest turn", ge=1, le=LARGEST_WEIGHT)
    rope_original_length: int = option(
        0, "rope_scaling=llama3 and yarn: context that the frequencies were learned at", "tokens", ge=0, le=MOST_TOKENS
    )
    image_size: int = option(
        0, "height and width of the images that are classified; 0: a language model", "pixels", ge=0, le=4096
    )
    channels: int = option(3, "images: 3 (colour) or 1 (grey-scale)", ge=1, le=3)
    patch_size: int = option(
        4, "images: height and width of a patch, which is a token; it sets sequence_length", "pixels", ge=1, le=1024
    )
    stem: Stem = option(
        Stem.PATCH, "images: patch (a linear map of each patch) or conv (two convolutions, patch_size 2 or 4)"
    )

    @model_validator(mode="before")
    @classmethod
    def _tokens_of_an_image(cls, values: Any) -> Any:
        """Fill in ``sequence_length``; what is no number is left to the fields' own checks."""
        size, patch = (values.get("image_size"), values.get("patch_size", 4)) if isinstance(values, dict) else (0, 1)
        if type(size) is not int or type(patch) is not int or size < 1 or patch < 1:
            return values
        if size < 2 * patch:
            raise ValueError(f"model.patch_size={patch} leaves one patch of model.image_size={size}; lower it")
        # A length that was given stays, for _check_patches to compare.
        return {"sequence_length": (size // patch) ** 2, **values}

    @model_validator(mode="after")
    def _check_patches(self) -> ModelConfig:
        if not self.image_size:
            return self
        if self.sliding_window:
            raise ValueError(
                f"model.sliding_window={self.sliding_window} is of text, and all patches of an image see each other; "
                "leave it out"
            )
        if self.tie_embeddings:
            raise ValueError(
                "model.tie_embeddings=true shares an embedding of tokens, and images have none; leave it out"
            )
        if self.channels == 2:
            raise ValueError("model.channels=2 is of no image; give 3 (colour) or 1 (grey-scale)")
        if self.image_size % self.patch_size:
            raise ValueError(f"model.patch_size={self.patch_size} must divide model.image_size={self.image_size}")
        if self.sequence_length != (self.image_size // self.patch_size) ** 2:
            patches = (self.image_size // self.patch_size) ** 2
            raise ValueError(
                f"model.sequence_length={self.sequence_length} is not the {patches} patches of "
                f"model.image_size={self.image_size} and model.patch_size={self.patch_size}; set it to {patches}"
            )
        if self.stem is Stem.CONV and self.patch_size not in (2, 4):
            raise ValueError(f"model.stem=conv needs model.patch_size 2 or 4, not {self.patch_size}; use stem=patch")
        return self

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.head_width % 2:
            raise ValueError(f"model.head_width={self.head_width} must be even, for rotary positions turn pairs")
        if not self.head_width and (self.width % self.heads or (self.width // self.heads) % 2):
            raise ValueError(
                f"model.heads={self.heads} must divide model.width={self.width} into an even width per head"
            )
        if self.rope_scaling in (RopeScaling.LLAMA3, RopeScaling.YARN) and not self.rope_original_length:
            raise ValueError(
                f"model.rope_scaling={self.rope_scaling.value} goes by the context before it; set "
                "model.rope_original_length to it"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}: equally many query heads share "
                "a key-value head"
            )
        if self.attention_width > MOST_FEATURES:
            raise ValueError(
                f"model.heads={self.heads} x model.head_width={self.head_width} is more than {MOST_FEATURES:,} features"
            )
        if self.moe_every > self.layers:
            raise ValueError(f"model.moe_every={self.moe_every} leaves no MoE layer in model.layers={self.layers}")
        if not self.moe_blocks:
            raise ValueError(
                f"model.dense_layers={self.dense_layers} with model.moe_every={self.moe_every} leaves no MoE layer in "
                f"model.layers={self.layers}"
            )
        return self

    @property
    def moe_blocks(self) -> list[int]:
        """Blocks with an MoE layer: the last of every ``moe_every``, after the first ``dense_layers``."""
        return [block for block in range(self.moe_every - 1, self.layers, self.moe_every) if block >= self.dense_layers]

    @property
    def attention_width(self) -> int:
        """Features of all attention heads together."""
        return self.heads * (self.head_width or self.width // self.heads)

    @property
    def kv_width(self) -> int:
        """Features of all key heads together, and of all value heads."""
        return self.attention_width // self.heads * (self.kv_heads or self.heads)


class MoEConfig(Section):
    """Experts and the router that picks them.

    Examples:
        >>> from vqmoe_ds.moe import MoEConfig
        >>> MoEConfig(router="topk", num_experts=8, expert_hidden=256, top_k=2).top_k
        2
    """

    router: str = option("vq", "the router: vq (codes, and top-k beside them), dense (no experts) or another")
    num_experts: int = option(16, "experts per layer", "experts", ge=1, le=MOST_EXPERTS)
    expert_hidden: int = option(192, "hidden width of one SwiGLU expert", "features", ge=1, le=MOST_FEATURES)
    top_k: int = option(
        1, "experts per token that the router chooses; 0 with vq: discrete path only", ge=0, le=MOST_EXPERTS
    )
    shared_experts: int = option(
        0,
        "experts that every token passes beside those of the router, as one wide MLP",
        "experts",
        ge=0,
        le=MOST_EXPERTS,
    )
    shared_gate: bool = option(
        False, "weight the shared experts by a learned sigmoid of the token's state (Qwen2-MoE); false: by 1"
    )
    balance_weight: float = option(
        0.01,
        "weight of the load-balancing loss (vq, hash_context, topk and its kin, xmoe, stablemoe, adaptive_clustering)",
        ge=0,
        le=LARGEST_WEIGHT,
    )
    z_loss_weight: float = option(0.0, "weight of the router z-loss", ge=0, le=LARGEST_WEIGHT)
    code_blend: float = option(
        0.0,
        "c in q = x + c(v - x), what the discrete expert sees; 1: the paper's equation, 0: codes only route",
        ge=0,
        le=1,
    )
    input_norm: bool = option(
        False, "the discrete expert sees a LayerNorm (no scale, no shift) of its input, as in the authors' release"
    )
    output_norm: bool = option(
        False,
        "a LayerNorm (no scale, no shift) follows every expert; with a discrete path (vq, hash_context) the discrete "
        "expert alone, as in the authors' release",
    )

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"moe.top_k={self.top_k} exceeds moe.num_experts={self.num_experts}")
        if self.shared_gate and not self.shared_experts:
            raise ValueError(
                "moe.shared_gate=true weights shared experts, and moe.shared_experts=0; set it or leave it out"
            )
        if self.shared_experts * self.expert_hidden > MOST_FEATURES:
            raise ValueError(
                f"moe.shared_experts={self.shared_experts} x moe.expert_hidden={self.expert_hidden} is more than "
                f"{MOST_FEATURES:,} features; lower one of them"
            )
        return self

    @property
    def norm(self) -> str | None:
        """The one of ``input_norm`` and ``output_norm`` that the model has, which the formats of others lack."""
        if self.output_norm and self.facts.has_experts:
            return "output_norm"
        return "input_norm" if self.input_norm and self.facts.uses_codebook else None

    @property
    def facts(self) -> type[RouterFacts]:
        """The class of the router, which answers what must be known of it."""
        return router_class(self.router)


class CodebookConfig(Section):
    """Codes: what they are compared with, how they are initialized, how they learn, and when they stop.

    Examples:
        >>> from vqmoe_ds.moe import CodebookConfig, LayerConfig, MoEConfig
        >>> book = CodebookConfig(source="layer_state", num_codes=64, distance="cosine")
        >>> LayerConfig(16, MoEConfig(router="vq"), codebook=book).codebook.num_codes
        64
    """

    section: ClassVar[str] = "codebook"

    num_codes: int = option(0, "codes K per layer; 0: as many as experts", "codes", ge=0, le=MOST_CODES)
    source: CodeSource = option(CodeSource.CONTEXT, "the vector that is compared with the codes")
    context_window: int = option(
        3, "source=context: tokens whose embeddings are mixed, the current one included", "tokens", ge=1, le=4096
    )
    context_decay: float = option(0.5, "source=context: weight of a token relative to the next one", ge=0, le=1)
    position_weight: float = option(
        0.5, "source=position_embedding: size of the position vector, embedding = 1", ge=0, le=LARGEST_WEIGHT
    )
    source_block: int = option(
        0, "source=early_block: index of the block whose output is looked at", ge=0, le=MOST_LAYERS
    )
    source_momentum: float = option(
        0.0,
        "look at a moving average of the embedding table with this momentum per step; 0: at the live table; 1: at a "
        "copy that never moves",
        ge=0,
        le=1,
    )
    normalize_source: bool = option(True, "scale source vectors to unit root mean square before the lookup")
    code_dim: int = option(
        0, "look codes up in a fixed random projection to this width; 0: full width", "features", ge=0, le=MOST_FEATURES
    )
    distance: Literal["euclidean", "cosine"] = option("euclidean", "of a source vector to a code")
    code_map: CodeMap = option(
        CodeMap.MOD, "code to expert: mod (k mod N, the paper's) or balanced by frequency when codes are initialized"
    )
    groups: int = option(
        1,
        "groups of experts: a token's group, the same in every layer, is that of its first layer's expert; the code of "
        "a later layer chooses within it",
        ge=1,
        le=MOST_EXPERTS,
    )
    init: Literal["kmeans", "random", "normal"] = option(
        "kmeans",
        "how codes are initialized: kmeans, random (samples of the source) or normal (deviation 0.02 and no data, as "
        "in the authors' release)",
    )
    init_step: int = option(
        1,
        "optimizer step at whose end codes are initialized on data; before it they are random",
        "steps",
        ge=1,
        le=MOST_STEPS,
    )
    kmeans_samples: int = option(
        8192, "vectors drawn from all ranks for the initialization", "vectors", ge=1, le=MOST_TOGETHER
    )
    kmeans_iterations: int = option(10, "Lloyd iterations of the initialization", ge=0, le=10_000)
    learning: Literal["ema", "gradient", "frozen"] = option(
        "ema", "how codes move: ema (running means of their tokens), gradient (the paper's) or frozen (random codes)"
    )
    learning_rate: float = option(
        3.5e-4,
        "learning=gradient: Adam step size of the codes; 0: the model's learning rate and its schedule",
        ge=0,
        le=LARGEST_WEIGHT,
    )
    decay: float = option(0.9, "learning=ema: decay per step right after the initialization", ge=0, le=1)
    decay_final: float = option(0.999, "learning=ema: decay reached after decay_steps", ge=0, le=1)
    decay_steps: int = option(200, "steps over which the decay rises", "steps", ge=0, le=MOST_STEPS)
    freeze_step: int = option(
        0, "optimizer step from which codes no longer move; 0: never frozen", "steps", ge=0, le=MOST_STEPS
    )
    dead_below: float = option(0.05, "re-seed codes used less than this share of the mean; 0: never", ge=0, lt=1)
    reseed_until: int = option(
        0, "last step at which dead codes are re-seeded; 0: no limit", "steps", ge=0, le=MOST_STEPS
    )
    overused_above: float = option(
        4.0,
        "until decay_steps, split codes used more than this many times the mean; 0: never",
        ge=0,
        le=LARGEST_WEIGHT,
    )
    commitment_weight: float = option(
        0.0, "weight of the commitment loss, per layer (source=layer_state only)", ge=0, le=LARGEST_WEIGHT
    )
    soft_output: float = option(
        0.0,
        "scale the discrete output by the softmax probability of its code at this temperature; 0: off",
        ge=0,
        le=LARGEST_WEIGHT,
    )

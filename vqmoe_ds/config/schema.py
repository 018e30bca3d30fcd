"""The typed run configuration: every option, its unit, its default and its meaning.

Presets (``config/presets/*.yaml``), ``--config FILE.yaml`` and ``--set section.field=value`` fill it in that
order. What DeepSpeed owns (ZeRO, precision, offload, expert-parallel size) stays in the DeepSpeed JSON, where
``"auto"`` means "as in this configuration".
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import Field, FieldSerializationInfo, ValidationInfo, field_serializer, field_validator, model_validator

from vqmoe_ds.config.fields import (
    LARGEST_SEED,
    LARGEST_WEIGHT,
    LONGEST_WAIT,
    MOST_CODES,
    MOST_EXPERTS,
    MOST_EXPERTS_IN_ALL,
    MOST_FEATURES,
    MOST_IDS,
    MOST_LAYERS,
    MOST_STEPS,
    MOST_TOGETHER,
    MOST_TOKENS,
    Section,
    option,
)
from vqmoe_ds.config.routers import LooksAhead, RouterFacts, RouterOptions, options_for, router_class
from vqmoe_ds.runtime.errors import ConfigError


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


class SequencePlacement(StrEnum):
    """Values of ``train.sp_placement``."""

    POSITION = "position"
    EXPERT = "expert"


class CodeMap(StrEnum):
    MOD = "mod"
    BALANCED = "balanced"


class Trainable(StrEnum):
    EXPERTS = "experts"
    HEAD = "head"
    ALL = "all"


class Extension(StrEnum):
    REPLAN = "replan"
    KEEP = "keep"
    WARMUP = "warmup"


class Precision(StrEnum):
    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Pool(StrEnum):
    MEAN = "mean"
    LAST = "last"


class Stem(StrEnum):
    PATCH = "patch"
    CONV = "conv"


class Augment(StrEnum):
    NONE = "none"
    CROP = "crop"
    CROP_FLIP = "crop_flip"
    RAND = "rand"


class LogTo(StrEnum):
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"


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
            raise ValueError(
                f"model.sequence_length={self.sequence_length} is not the {(self.image_size // self.patch_size) ** 2} "
                f"patches of model.image_size={self.image_size} and model.patch_size={self.patch_size}; leave it out"
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
        False, "a LayerNorm (no scale, no shift) follows the discrete expert, as in the authors' release"
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


class TrainConfig(Section):
    """Optimisation. Learning rate, betas, decay, clipping and batch size fill the "auto" of the DeepSpeed JSON."""

    section: ClassVar[str] = "train"

    steps: int = option(1000, "optimizer steps of the whole run", "steps", ge=1, le=MOST_STEPS)
    batch_size: int = option(16, "sequences per optimizer step, over all ranks", "sequences", ge=1, le=MOST_TOGETHER)
    learning_rate: float = option(3e-3, "peak learning rate of AdamW", gt=0, le=LARGEST_WEIGHT)
    min_learning_rate_ratio: float = option(0.1, "final learning rate as a share of the peak", ge=0, le=1)
    warmup_steps: int = option(50, "linear warm-up", "steps", ge=0, le=MOST_STEPS)
    extension: Extension = option(
        Extension.REPLAN,
        "schedule of a finished run that goes on: replan (one schedule over all steps), keep (the learning rate of its "
        "end) or warmup (again up to the peak, and down over the new steps)",
    )
    extended_from: int = option(
        0, "steps of the run that extension goes on from, filled in by the run", "steps", ge=0, le=MOST_STEPS
    )
    weight_decay: float = option(
        0.1,
        "decay of weight matrices (not of norms and biases; decay_gates says whether of routers)",
        ge=0,
        le=LARGEST_WEIGHT,
    )
    decay_gates: bool = option(True, "whether weight decay falls on the matrices of routers (gates) too")
    beta1: float = option(0.9, "AdamW beta 1", ge=0, lt=1)
    beta2: float = option(0.95, "AdamW beta 2", ge=0, lt=1)
    grad_clip: float = option(1.0, "gradient norm limit; 0: none", ge=0, le=LARGEST_WEIGHT)
    seed: int = option(1234, "seed of weights, data order and codes", ge=0, le=LARGEST_SEED)
    precision: Precision = option(
        Precision.AUTO, "of weights and products: bf16, fp16 or fp32; auto: the DeepSpeed JSON's, else bf16 on a GPU"
    )
    activation_checkpointing: bool = option(False, "recompute every block in backward to save memory")
    deterministic: bool = option(
        True,
        "on a GPU: bit-exact runs and resumes; false: a faster backward pass of attention, whose sums differ in their "
        "last bits (on a CPU runs are bit-exact either way)",
    )
    sequence_parallel_size: int = option(
        1,
        "ranks that share every sequence: each holds a part of its positions, and within attention of the heads",
        "ranks",
        ge=1,
        le=MOST_FEATURES,
    )
    sp_placement: SequencePlacement = option(
        SequencePlacement.POSITION,
        "where ranks that share sequences compute a token between attentions: position (each a stretch) or expert (on "
        "the rank of its group of experts, so that no row travels to them)",
    )
    label_smoothing: float = option(
        0.0, "images: share of a label that is spread evenly over all classes in training", ge=0, lt=1
    )
    max_bad_steps: int = option(5, "NaN or infinite steps in a row before the run stops", "steps", ge=1, le=MOST_STEPS)


class DataConfig(Section):
    """The text, raw or prepared corpora (``PREFIX.bin`` and ``PREFIX.idx``), or the images (docs/vision.md)."""

    path: str | list[str] | None = option(
        None,
        "file or folder of any bytes, hub:NAME[:CONFIG[:SPLIT]], or one or more prepared prefixes, each PREFIX or "
        "WEIGHT:PREFIX; none: the standard library's documentation",
    )
    holdout_every: int = option(
        10,
        "raw text: one in this many stretches is held out; images without a test set: one in this many images",
        "stretches",
        ge=2,
        le=MOST_STEPS,
    )
    split: str = option("90,10,0", "prepared data: shares of training, validation and test, spread over each corpus")
    valid_path: str | list[str] | None = option(
        None, "validate on this text or these prefixes instead of a held-out part"
    )
    tokenizer: str | None = option(
        None, "tokenizer of prepared data that has no PREFIX.json: bytes, a folder, a .model or a vocabulary .txt"
    )
    tokenizer_sha256: str | None = option(
        None, "checksum of the data's tokenizer, filled in by the run; set, other data is refused"
    )
    cache_dir: str | None = option(
        None, "folder of shuffled indices of prepared data, or of decoded images; none: data_index in the run folder"
    )
    separate_documents: bool = option(
        False, "attend, and mix context codes, within a document alone (of raw text a file), whose positions begin anew"
    )
    classes: tuple[str, ...] = option((), "names of the classes of images, filled in by the run; none: text")
    augment: Augment = option(
        Augment.CROP_FLIP,
        "changes of training images: none, crop (shifts by up to image_size / 8), crop_flip, or rand (and RandAugment)",
    )
    mixup: float = option(
        0.0, "images: alpha of the Beta distribution by which each is blended with another; 0: none are", ge=0, le=100
    )
    cutmix: float = option(
        0.0, "images: alpha of the Beta distribution by which each gets a box of another; 0: none do", ge=0, le=100
    )
    resize: bool = option(False, "scale images in files of their own and cut out the centre; false: refuse other sizes")


class FinetuneConfig(Section):
    """Fine-tuning; read by ``launchers/finetune.py`` alone, which fills in the first three."""

    checkpoint: str | None = option(None, "where the run started from; none: it is no fine-tuning")
    task: str | None = option(
        None, "sst2, sst5, imdb, banking77, a CSV, TSV, JSONL or folder, NAME=PATH, or lm (language modelling)"
    )
    classes: tuple[str, ...] = option((), "names of the classes, found in the training set; none: a language model")
    text_key: str = option("text", "column or key of the text")
    label_key: str | None = option(None, "column or key of the label; none: label, in banking77 category")
    skip_bad_rows: bool = option(False, "leave rows out, and count them, that have no text or no known label")
    discrete: bool = option(True, "of a vq checkpoint keep the discrete path alone, with codebook and quantizer frozen")
    trainable: Trainable = option(
        Trainable.EXPERTS, "what learns: experts (with the head), head, or all but the quantizer"
    )
    expert_memory: str | None = option(
        None,
        "memory for frozen experts, such as 256MiB; all of them lie in a file of the run folder's disk; none: whole",
    )
    lora_rank: int = option(
        0, "rank of LoRA adapters on the attention's matrices, which learn too; 0: none", ge=0, le=MOST_FEATURES
    )
    lora_alpha: float = option(16.0, "LoRA: adapters count by this over their rank", gt=0, le=LARGEST_WEIGHT)
    pool: Pool = option(Pool.MEAN, "what a text is classified by: the mean of its tokens' states, or the last one")
    epochs: float = option(
        5.0, "passes over the training texts, unless train.steps is set", "epochs", gt=0, le=LARGEST_WEIGHT
    )
    patience: int = option(
        5, "validations in a row without a new best loss after which training ends; 0: never", ge=0, le=MOST_STEPS
    )
    holdout: float = option(
        0.1, "share of the training texts held out for each split the task does not have", gt=0, lt=0.5
    )
    shots: int = option(0, "training texts of each class, drawn by the seed; 0: all", "texts", ge=0, le=MOST_TOGETHER)


class OutputConfig(Section):
    """The run folder, what is written to it, and when."""

    run_dir: str = option("runs/pretrain", "folder of everything the run writes")
    log_to: tuple[LogTo, ...] | None = option(
        None,
        "where metrics go beside metrics.jsonl: any of tensorboard, wandb and mlflow, as wandb,mlflow; "
        "none: to tensorboard if it is installed",
    )
    log_every: int = option(10, "interval of metrics", "steps", ge=1, le=MOST_STEPS)
    eval_every: int = option(200, "interval of validation; 0: only at the end", "steps", ge=0, le=MOST_STEPS)
    eval_batches: int = option(8, "batches of an interim validation", "batches", ge=1, le=MOST_STEPS)
    final_eval_windows: int = option(
        0,
        "held-out windows of the closing validation of a pretraining, evenly spaced; 0: all",
        "windows",
        ge=0,
        le=MOST_STEPS,
    )
    save_every: int = option(200, "interval of checkpoints; 0: only at the end", "steps", ge=0, le=MOST_STEPS)
    keep_last: int = option(3, "newest checkpoints kept; 0: all", "checkpoints", ge=0, le=MOST_STEPS)
    keep_every: int = option(
        0, "checkpoints of steps divisible by this stay for good; 0: none do", "steps", ge=0, le=MOST_STEPS
    )
    keep_best: bool = option(False, "save when an interim validation is the best so far, and keep that checkpoint")
    start_timeout: float = option(
        300.0, "how long ranks wait for each other at the start", "seconds", gt=0, le=LONGEST_WAIT
    )
    peer_timeout: float = option(
        120.0, "a rank that shows no life for so long is missing: the others leave", "seconds", gt=0, le=LONGEST_WAIT
    )
    probe_tokens: int = option(
        2048, "held-out tokens on which routing fluctuation is measured; 0: off", "tokens", ge=0, le=MOST_TOKENS
    )
    sample_tokens: int = option(200, "tokens of the text sample at the end; 0: none", "tokens", ge=0, le=MOST_TOKENS)

    @field_validator("log_to", mode="before")
    @classmethod
    def _separate(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


class RunConfig(Section):
    """Everything about one run."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    router: RouterOptions = Field(default_factory=RouterOptions, validate_default=True)
    codebook: CodebookConfig = CodebookConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    run: OutputConfig = OutputConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @field_validator("router", mode="plain")
    @classmethod
    def _options_of_the_router(cls, given: Any, info: ValidationInfo) -> RouterOptions:
        moe = info.data.get("moe")
        return options_for((moe or MoEConfig()).router, given if moe is not None else {})

    @field_serializer("router")
    def _all_options(self, options: RouterOptions, info: FieldSerializationInfo) -> dict[str, Any]:
        return options.model_dump(mode=info.mode)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        facts = self.moe.facts
        self._check_counters()
        if self.moe.top_k == 0 and facts.needs_top_k:
            raise ValueError(
                f"moe.top_k=0 leaves moe.router={self.moe.router} without experts; use 1 or more, or moe.router=vq"
            )
        facts.check(self)
        self._check_images()
        return self

    def _check_images(self) -> None:
        """Refuse what images do not have: ids of tokens, and an order in which one patch comes before another."""
        book, router = self.codebook, self.moe.router
        if not self.model.image_size:
            of_images = {
                "train.label_smoothing": self.train.label_smoothing,
                "data.mixup": self.data.mixup,
                "data.cutmix": self.data.cutmix,
            }
            given = next((name for name, value in of_images.items() if value), None)
            if given is not None:
                raise ValueError(f"{given} is for images (model.image_size); leave it out")
            if self.moe.facts.uses_codebook and book.source is CodeSource.PATCH:
                raise ValueError(
                    "codebook.source=patch looks at the pixels of images (model.image_size), and text has none; use "
                    "context or token_embedding"
                )
            return
        if self.data.separate_documents:
            raise ValueError("data.separate_documents is for text, not for images (model.image_size); leave it out")
        if self.moe.facts.needs_token_ids:
            raise ValueError(
                f"moe.router={router} reads ids of tokens, and patches of images have none; use moe.router=vq with "
                "codebook.source=token_embedding (codes of patch embeddings), or a router that reads states"
            )
        if self.moe.facts.uses_codebook and book.source is CodeSource.CONTEXT:
            raise ValueError(
                "codebook.source=context mixes the tokens before a token, and patches have no such order; use "
                "layer_state, patch, token_embedding, position_embedding or early_block"
            )
        if self.moe.facts.uses_codebook and book.source_momentum:
            raise ValueError("codebook.source_momentum averages a table of tokens, and images have none; leave it out")

    @property
    def rows_per_token(self) -> int:
        """Expert calls of a token in one layer; the mean over the run, rounded up, where that varies."""
        return self.moe.facts.calls_per_token(self)

    @property
    def source_width(self) -> int:
        """Width of the vectors that are compared with codes, before ``codebook.code_dim``: values of a patch, or D."""
        model = self.model
        of_pixels = self.codebook.source is CodeSource.PATCH
        return model.patch_size**2 * model.channels if of_pixels else model.width

    @property
    def ties_head(self) -> bool:
        """Whether the output layer is the embedding's weight; the head of a classifier is its own."""
        return self.model.tie_embeddings and not self.finetune.classes

    @property
    def dense_hidden(self) -> int:
        """Hidden width of the MLPs of layers without experts."""
        return self.model.dense_hidden or self.moe.expert_hidden * (self.rows_per_token + self.moe.shared_experts)

    @property
    def looks_ahead(self) -> LooksAhead | None:
        """The reason for which the experts of a token may depend on later tokens; None where they do not."""
        return self.moe.facts.looks_ahead(self.router)

    def require_causal(self, purpose: str) -> None:
        """Refuse a router that looks ahead.

        Args:
            purpose: what needs causality, as the subject of a sentence ("generating text").

        Raises:
            ConfigError: it does.
        """
        ahead = self.looks_ahead
        if ahead is not None:
            raise ConfigError(f"{purpose} needs a router that sees no later token, but {ahead.reason}; {ahead.remedy}")

    def _check_counters(self) -> None:
        tokens = self.train.steps * self.train.batch_size * self.model.sequence_length
        if tokens >= 2**63:
            raise ValueError(
                f"train.steps={self.train.steps} x train.batch_size={self.train.batch_size} x "
                f"model.sequence_length={self.model.sequence_length} is {tokens:.1e} tokens, and counters of 64 bits "
                "end at 9.2e18; lower one of them"
            )

        experts = len(self.model.moe_blocks) * self.moe.num_experts
        if experts > MOST_EXPERTS_IN_ALL and self.moe.facts.has_experts:
            raise ValueError(
                f"model.layers={self.model.layers} with moe.num_experts={self.moe.num_experts} each are {experts:,} "
                f"experts, and {MOST_EXPERTS_IN_ALL:,} are the most; lower one of them or raise model.moe_every"
            )

"""The typed run configuration: every option, its unit, its default and what it means.

Presets (``config/presets/*.yaml``), ``--config FILE.yaml`` and ``--set section.field=value`` fill it in that
order. What DeepSpeed owns (ZeRO, precision, offload, expert-parallel size) stays in the DeepSpeed JSON, where
``"auto"`` means "as in this configuration".
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

LONGEST_PATH = 4096
"""Characters of a text: what Linux takes for a path (``PATH_MAX``)."""
MOST_LAYERS = 1024
"""The deepest published transformers have a thousand blocks; a plan looks at every one."""
MOST_EXPERTS = 1 << 14
"""Of a layer; the largest published count is 2,048. Each is an object of its own, with a name in checkpoints."""
MOST_EXPERTS_IN_ALL = 1 << 17
"""Of all layers; some 0.3 ms of every start go into naming one."""
MOST_CODES = 1 << 20
"""Of a layer; distances of every token to every code are computed."""
MOST_FEATURES = 1 << 20
"""Of any width: the widest published models have some 20,000."""
MOST_TOKENS = 1 << 24
"""Of one sequence; positions are kept as float32, which counts to 2^24."""
MOST_IDS = 1 << 31
"""Ids of tokens are kept in 32 bits."""
MOST_STEPS = 10**12
"""Steps, and intervals of them: thirty years at a thousand a second. Counters have 64 bits."""
MOST_TOGETHER = 1 << 30
"""Sequences of a batch, vectors of a sample and the like: indices into them have 32 bits."""
LARGEST_SEED = (1 << 32) - 1
"""NumPy's and most libraries' generators take 32 bits."""
LONGEST_WAIT = 7 * 86400.0
"""Seconds; no queue or network needs a week, and libraries take no more than 292 years."""
LARGEST_WEIGHT = 1e6
"""Of factors, weights and temperatures: low-precision sums of losses overflow past it."""
RENAMED = {"train.min_learning_rate": "train.min_learning_rate_ratio"}
"""Former names of fields; files and checkpoints that have them are read as if they had the names of today."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=LONGEST_PATH)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in (int, float):
            raise PydanticCustomError("number", "Input should be a number")
        return value


def with_current_names(section: str, fields: dict[Any, Any]) -> dict[Any, Any]:
    """Fields of a section under their names of today.

    Raises:
        ValueError: one is there under its former name as well.
    """
    found: dict[Any, Any] = {}
    for former, value in fields.items():
        name = RENAMED.get(f"{section}.{former}", "").partition(".")[2] or former
        if name in found or (name != former and name in fields):
            raise ValueError(f"{section}.{former} and {section}.{name} are the same field; give one of them")
        found[name] = value
    return found


def _f(default: Any, meaning: str, unit: str = "", **bounds: Any) -> Any:
    return Field(default, description=meaning, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Router(StrEnum):
    VQ = "vq"
    TOPK = "topk"
    EXPERT_BIAS = "expert_bias"
    XMOE = "xmoe"
    STABLEMOE = "stablemoe"
    SMOE_DROPOUT = "smoe_dropout"
    RANDOM_FROZEN = "random_frozen"
    HASH_TOKEN = "hash_token"
    ONLINE_KMEANS = "online_kmeans"
    EXPERT_CHOICE = "expert_choice"
    ADAPTIVE_CLUSTERING = "adaptive_clustering"
    DENSE = "dense"


class SoftmaxOver(StrEnum):
    AUTO = "auto"
    CHOSEN = "chosen"
    ALL = "all"


class ClusterStatistics(StrEnum):
    RUNNING = "running"
    BATCH = "batch"
    NONE = "none"


class FeatureScaling(StrEnum):
    PER_FEATURE = "per_feature"
    GLOBAL = "global"


class CodeSource(StrEnum):
    LAYER_STATE = "layer_state"
    TOKEN_EMBEDDING = "token_embedding"
    POSITION_EMBEDDING = "position_embedding"
    CONTEXT = "context"
    EARLY_BLOCK = "early_block"


class QKNorm(StrEnum):
    NONE = "none"
    HEADS = "heads"
    FULL = "full"


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


class ModelConfig(_Section):
    """The transformer around the experts: pre-norm decoder, RMSNorm, rotary positions, causal SDPA attention."""

    vocab_size: int = _f(
        256, "size of the vocabulary; unless set, that of the data's tokenizer", "tokens", ge=2, le=MOST_IDS
    )
    layers: int = _f(4, "transformer blocks", ge=1, le=MOST_LAYERS)
    width: int = _f(128, "model width d", "features", ge=2, le=MOST_FEATURES)
    heads: int = _f(4, "attention heads; must divide the width unless head_width is set", ge=1, le=MOST_FEATURES)
    head_width: int = _f(0, "width of an attention head; 0: width / heads", "features", ge=0, le=MOST_FEATURES)
    qk_norm: QKNorm = _f(
        QKNorm.NONE, "RMSNorm of queries and keys: none, heads (each head alone, Qwen 3) or full (all together, OLMoE)"
    )
    sequence_length: int = _f(256, "training context", "tokens", ge=2, le=MOST_TOKENS)
    moe_every: int = _f(1, "an MoE layer in every n-th block (1: all, 2: every second)", "blocks", ge=1, le=MOST_LAYERS)
    dense_hidden: int = _f(
        0, "hidden width of the dense MLPs; 0: that of the experts a token uses", "features", ge=0, le=MOST_FEATURES
    )
    rope_theta: float = _f(10000.0, "base of the rotary frequencies", gt=0, le=1e12)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.head_width % 2:
            raise ValueError(f"model.head_width={self.head_width} must be even, for rotary positions turn pairs")
        if not self.head_width and (self.width % self.heads or (self.width // self.heads) % 2):
            raise ValueError(
                f"model.heads={self.heads} must divide model.width={self.width} into an even width per head"
            )
        if self.attention_width > MOST_FEATURES:
            raise ValueError(
                f"model.heads={self.heads} x model.head_width={self.head_width} is more than {MOST_FEATURES:,} features"
            )
        if self.moe_every > self.layers:
            raise ValueError(f"model.moe_every={self.moe_every} leaves no MoE layer in model.layers={self.layers}")
        return self

    @property
    def attention_width(self) -> int:
        """Features of all attention heads together."""
        return self.heads * (self.head_width or self.width // self.heads)


class MoEConfig(_Section):
    """Experts and the router that picks them."""

    router: Router = _f(
        Router.VQ, "vq: codes and optional top-k; dense: no experts; the others: " + ", ".join(list(Router)[1:-1])
    )
    num_experts: int = _f(16, "experts a layer", "experts", ge=1, le=MOST_EXPERTS)
    expert_hidden: int = _f(192, "hidden width of one SwiGLU expert", "features", ge=1, le=MOST_FEATURES)
    top_k: int = _f(1, "experts a token is sent to by the router; 0 with vq: discrete path only", ge=0, le=MOST_EXPERTS)
    balance_weight: float = _f(
        0.01,
        "weight of the load-balancing loss (vq, topk, xmoe, stablemoe, adaptive_clustering)",
        ge=0,
        le=LARGEST_WEIGHT,
    )
    z_loss_weight: float = _f(0.0, "weight of the router z-loss", ge=0, le=LARGEST_WEIGHT)
    code_blend: float = _f(
        0.0,
        "c in q = x + c(v - x), what the discrete expert sees; 1: the paper's equation, 0: codes only route",
        ge=0,
        le=1,
    )

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"moe.top_k={self.top_k} exceeds moe.num_experts={self.num_experts}")
        if self.top_k == 0 and self.router not in (Router.VQ, Router.HASH_TOKEN, Router.DENSE):
            raise ValueError(
                f"moe.top_k=0 leaves moe.router={self.router.value} without experts; use 1 or more, or moe.router=vq"
            )
        return self


class RouterConfig(_Section):
    """Options of single routers beside vq; those that ``moe.router`` does not read do nothing."""

    softmax_over: SoftmaxOver = _f(
        SoftmaxOver.AUTO,
        "weights of the chosen experts: softmax over chosen or all; "
        "auto: over all for learned routers at top_k 1, else over the chosen",
    )
    bias_rate: float = _f(0.001, "expert_bias: how far the bias of an expert moves a step", gt=0, le=LARGEST_WEIGHT)
    low_dim: int = _f(
        0, "xmoe, stablemoe: width of the routing space; 0: half the experts, 50", "features", ge=0, le=MOST_FEATURES
    )
    temperature: float = _f(
        0.3,
        "of the cosines; xmoe: at the start (it is learned), online_kmeans: of the weights",
        gt=0,
        le=LARGEST_WEIGHT,
    )
    final_top_k: int = _f(0, "smoe_dropout: moe.top_k grows to this; 0: all experts", "experts", ge=0, le=MOST_EXPERTS)
    growth_steps: int = _f(0, "smoe_dropout: steps over which it grows; 0: the whole run", "steps", ge=0, le=MOST_STEPS)
    distil_steps: int = _f(
        0, "stablemoe: steps of the first stage; 0: a tenth of the run", "steps", ge=0, le=MOST_STEPS
    )
    distil_weight: float = _f(1.0, "stablemoe: weight of the distillation loss", gt=0, le=LARGEST_WEIGHT)
    decay: float = _f(0.99, "online_kmeans, adaptive_clustering: decay of running statistics a step", ge=0, lt=1)
    statistics: ClusterStatistics = _f(
        ClusterStatistics.RUNNING,
        "adaptive_clustering: running (causal), batch (as published, not causal), none (all weights 1, the control)",
    )
    scaling: FeatureScaling = _f(
        FeatureScaling.PER_FEATURE, "adaptive_clustering: mean weight 1 per feature over clusters, or global over both"
    )
    feature_clip: float = _f(
        10.0, "adaptive_clustering: largest weight, as a multiple of the mean", gt=1, le=LARGEST_WEIGHT
    )


class CodebookConfig(_Section):
    """What codes look at, how they are born, how they learn, and when they stop."""

    num_codes: int = _f(0, "codes K a layer; 0: as many as experts", "codes", ge=0, le=MOST_CODES)
    source: CodeSource = _f(CodeSource.CONTEXT, "the vector that is compared with the codes")
    context_window: int = _f(
        3, "source=context: tokens whose embeddings are mixed, the current one included", "tokens", ge=1, le=4096
    )
    context_decay: float = _f(0.5, "source=context: weight of a token relative to the next one", ge=0, le=1)
    position_weight: float = _f(
        0.5, "source=position_embedding: size of the position vector, embedding = 1", ge=0, le=LARGEST_WEIGHT
    )
    source_block: int = _f(0, "source=early_block: index of the block whose output is looked at", ge=0, le=MOST_LAYERS)
    source_momentum: float = _f(
        0.0,
        "look at a moving average of the embedding table with this momentum a step; 0: at the live table; 1: at a copy "
        "that never moves",
        ge=0,
        le=1,
    )
    normalize_source: bool = _f(True, "scale source vectors to unit root mean square before the lookup")
    code_dim: int = _f(
        0, "look codes up in a fixed random projection to this width; 0: full width", "features", ge=0, le=MOST_FEATURES
    )
    distance: Literal["euclidean", "cosine"] = _f("euclidean", "of a source vector to a code")
    code_map: CodeMap = _f(CodeMap.MOD, "code to expert: mod (k mod N, the paper's) or balanced by frequency at birth")
    init: Literal["kmeans", "random"] = _f("kmeans", "how codes are placed at birth; random: samples of the source")
    birth_step: int = _f(
        1, "optimizer step at whose end the codes are placed; before it they are random", "steps", ge=1, le=MOST_STEPS
    )
    kmeans_samples: int = _f(8192, "vectors drawn from all ranks at birth", "vectors", ge=1, le=MOST_TOGETHER)
    kmeans_iterations: int = _f(10, "Lloyd iterations at birth", ge=0, le=10_000)
    learning: Literal["ema", "gradient", "frozen"] = _f(
        "ema", "how codes move: ema (running means of their tokens), gradient (the paper's) or frozen (random codes)"
    )
    learning_rate: float = _f(3.5e-4, "learning=gradient: Adam step size of the codes", gt=0, le=LARGEST_WEIGHT)
    decay: float = _f(0.9, "learning=ema: decay a step right after birth", ge=0, le=1)
    decay_final: float = _f(0.999, "learning=ema: decay reached after decay_steps", ge=0, le=1)
    decay_steps: int = _f(200, "steps over which the decay rises", "steps", ge=0, le=MOST_STEPS)
    freeze_step: int = _f(
        0, "optimizer step from which codes no longer move; 0: never frozen", "steps", ge=0, le=MOST_STEPS
    )
    dead_below: float = _f(0.05, "re-seed codes used less than this share of the mean; 0: never", ge=0, lt=1)
    reseed_until: int = _f(0, "last step at which dead codes are re-seeded; 0: no limit", "steps", ge=0, le=MOST_STEPS)
    crowded_above: float = _f(
        4.0, "until decay_steps, halve codes used more than this many times the mean; 0: never", ge=0, le=LARGEST_WEIGHT
    )
    commitment_weight: float = _f(
        0.0, "weight of the commitment loss a layer (source=layer_state only)", ge=0, le=LARGEST_WEIGHT
    )
    soft_output: float = _f(
        0.0,
        "scale the discrete output by the softmax probability of its code at this temperature; 0: off",
        ge=0,
        le=LARGEST_WEIGHT,
    )


class TrainConfig(_Section):
    """Optimisation. Learning rate, betas, decay, clipping and batch size fill the "auto" of the DeepSpeed JSON."""

    steps: int = _f(1000, "optimizer steps of the whole run", "steps", ge=1, le=MOST_STEPS)
    batch_size: int = _f(16, "sequences an optimizer step, over all ranks", "sequences", ge=1, le=MOST_TOGETHER)
    learning_rate: float = _f(3e-3, "peak learning rate of AdamW", gt=0, le=LARGEST_WEIGHT)
    min_learning_rate_ratio: float = _f(0.1, "final learning rate as a share of the peak", ge=0, le=1)
    warmup_steps: int = _f(50, "linear warm-up", "steps", ge=0, le=MOST_STEPS)
    extension: Extension = _f(
        Extension.REPLAN,
        "schedule of a finished run that goes on: replan (one schedule over all steps), keep (the learning rate of its "
        "end) or warmup (again up to the peak, and down over the new steps)",
    )
    extended_from: int = _f(
        0, "steps of the run that extension goes on from, filled in by the run", "steps", ge=0, le=MOST_STEPS
    )
    weight_decay: float = _f(0.1, "decay of weight matrices (not of norms and gates)", ge=0, le=LARGEST_WEIGHT)
    beta1: float = _f(0.9, "AdamW beta 1", ge=0, lt=1)
    beta2: float = _f(0.95, "AdamW beta 2", ge=0, lt=1)
    grad_clip: float = _f(1.0, "gradient norm limit; 0: none", ge=0, le=LARGEST_WEIGHT)
    seed: int = _f(1234, "seed of weights, data order and codes", ge=0, le=LARGEST_SEED)
    precision: Precision = _f(
        Precision.AUTO, "of weights and products: bf16, fp16 or fp32; auto: the DeepSpeed JSON's, else bf16 on a GPU"
    )
    activation_checkpointing: bool = _f(False, "recompute every block in backward to save memory")
    deterministic: bool = _f(
        True,
        "on a GPU: bit-exact runs and resumes; false: a faster backward pass of attention, whose sums differ in their "
        "last bits (on a CPU runs are bit-exact either way)",
    )
    max_bad_steps: int = _f(5, "NaN or infinite steps in a row before the run stops", "steps", ge=1, le=MOST_STEPS)

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, values: Any) -> Any:
        return with_current_names("train", values) if isinstance(values, dict) else values


class DataConfig(_Section):
    """Where the text comes from: raw text, or prepared corpora (``PREFIX.bin`` and ``PREFIX.idx``)."""

    path: str | list[str] | None = _f(
        None,
        "file or folder of any bytes, or one or more prepared prefixes, each PREFIX or WEIGHT:PREFIX; "
        "none: the standard library's documentation",
    )
    holdout_every: int = _f(10, "raw text: one in this many stretches is held out", "stretches", ge=2, le=MOST_STEPS)
    split: str = _f("90,10,0", "prepared data: shares of training, validation and test, spread over each corpus")
    valid_path: str | list[str] | None = _f(None, "validate on this text or these prefixes instead of a held-out part")
    tokenizer: str | None = _f(
        None, "tokenizer of prepared data that has no PREFIX.json: bytes, a folder, a .model or a vocabulary .txt"
    )
    tokenizer_sha256: str | None = _f(
        None, "checksum of the data's tokenizer, filled in by the run; set, other data is refused"
    )
    cache_dir: str | None = _f(None, "prepared data: folder of shuffled indices; none: data_index in the run folder")


class FinetuneConfig(_Section):
    """What is fine-tuned on what; read by ``launchers/finetune.py`` alone, which fills in the first three."""

    checkpoint: str | None = _f(None, "where the run started from; none: it is no fine-tuning")
    task: str | None = _f(
        None, "sst2, sst5, imdb, banking77, a CSV, TSV, JSONL or folder, NAME=PATH, or lm (language modelling)"
    )
    classes: tuple[str, ...] = _f((), "names of the classes, found in the training set; none: a language model")
    text_key: str = _f("text", "column or key of the text")
    label_key: str | None = _f(None, "column or key of the label; none: label, in banking77 category")
    skip_bad_rows: bool = _f(False, "leave rows out, and count them, that have no text or no known label")
    discrete: bool = _f(True, "of a vq checkpoint keep the discrete path alone, with codebook and quantizer frozen")
    trainable: Trainable = _f(Trainable.EXPERTS, "what learns: experts (with the head), head, or all but the quantizer")
    lora_rank: int = _f(
        0, "rank of LoRA adapters on the attention's matrices, which learn too; 0: none", ge=0, le=MOST_FEATURES
    )
    lora_alpha: float = _f(16.0, "LoRA: adapters count by this over their rank", gt=0, le=LARGEST_WEIGHT)
    pool: Pool = _f(Pool.MEAN, "what a text is classified by: the mean of its tokens' states, or the last one")
    epochs: float = _f(
        5.0, "passes over the training texts, unless train.steps is set", "epochs", gt=0, le=LARGEST_WEIGHT
    )
    patience: int = _f(
        5, "validations in a row without a new best loss after which training ends; 0: never", ge=0, le=MOST_STEPS
    )
    holdout: float = _f(0.1, "share of the training texts held out for each split the task does not have", gt=0, lt=0.5)
    shots: int = _f(0, "training texts of each class, drawn by the seed; 0: all", "texts", ge=0, le=MOST_TOGETHER)


class OutputConfig(_Section):
    """The run folder and what is written to it, and when."""

    run_dir: str = _f("runs/pretrain", "folder of everything the run writes")
    log_every: int = _f(10, "interval of metrics", "steps", ge=1, le=MOST_STEPS)
    eval_every: int = _f(200, "interval of validation; 0: only at the end", "steps", ge=0, le=MOST_STEPS)
    eval_batches: int = _f(8, "batches of an interim validation", "batches", ge=1, le=MOST_STEPS)
    final_eval_windows: int = _f(
        0,
        "held-out windows of the closing validation of a pretraining, evenly spaced; 0: all",
        "windows",
        ge=0,
        le=MOST_STEPS,
    )
    save_every: int = _f(200, "interval of checkpoints; 0: only at the end", "steps", ge=0, le=MOST_STEPS)
    keep_last: int = _f(3, "newest checkpoints kept; 0: all", "checkpoints", ge=0, le=MOST_STEPS)
    keep_every: int = _f(
        0, "checkpoints of steps divisible by this stay for good; 0: none do", "steps", ge=0, le=MOST_STEPS
    )
    keep_best: bool = _f(False, "save when an interim validation is the best so far, and keep that checkpoint")
    start_timeout: float = _f(
        300.0, "how long ranks wait for each other at the start", "seconds", gt=0, le=LONGEST_WAIT
    )
    peer_timeout: float = _f(
        120.0, "a rank that shows no life for so long is missing: the others leave", "seconds", gt=0, le=LONGEST_WAIT
    )
    probe_tokens: int = _f(
        2048, "held-out tokens on which routing fluctuation is measured; 0: off", "tokens", ge=0, le=MOST_TOKENS
    )
    sample_tokens: int = _f(200, "tokens of the text sample at the end; 0: none", "tokens", ge=0, le=MOST_TOKENS)


class RunConfig(_Section):
    """Everything about one run."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    router: RouterConfig = RouterConfig()
    codebook: CodebookConfig = CodebookConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    run: OutputConfig = OutputConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        book, moe = self.codebook, self.moe
        self._check_counters()
        self._check_router()
        if moe.router is not Router.VQ:
            return self
        in_layer_space = (
            book.source is CodeSource.LAYER_STATE
            and not book.code_dim
            and not book.normalize_source
            and book.distance == "euclidean"
        )
        if moe.code_blend > 0 and not in_layer_space:
            raise ValueError(
                "moe.code_blend>0 feeds code vectors to experts, so they must live among the layer's states: set "
                "codebook.source=layer_state, codebook.normalize_source=false, codebook.distance=euclidean and "
                "codebook.code_dim=0"
            )
        if book.commitment_weight > 0 and not in_layer_space:
            raise ValueError(
                "codebook.commitment_weight>0 pulls layer states toward codes: it needs codebook.source=layer_state, "
                "codebook.normalize_source=false, codebook.distance=euclidean and codebook.code_dim=0"
            )
        if book.source is CodeSource.EARLY_BLOCK and book.source_block >= self.model.layers - 1:
            raise ValueError(
                f"codebook.source_block={book.source_block} must be under model.layers - 1 = {self.model.layers - 1}"
            )
        if book.code_dim > self.model.width:
            raise ValueError(f"codebook.code_dim={book.code_dim} exceeds model.width={self.model.width}")
        if book.source_momentum and book.source in (CodeSource.LAYER_STATE, CodeSource.EARLY_BLOCK):
            raise ValueError(
                "codebook.source_momentum works on embeddings, not on codebook.source=" + book.source.value
            )
        return self

    def _check_counters(self) -> None:
        tokens = self.train.steps * self.train.batch_size * self.model.sequence_length
        if tokens >= 2**63:
            raise ValueError(
                f"train.steps={self.train.steps} x train.batch_size={self.train.batch_size} x "
                f"model.sequence_length={self.model.sequence_length} is {tokens:.1e} tokens, and counters of 64 bits "
                "end at 9.2e18; lower one of them"
            )

        experts = (self.model.layers // self.model.moe_every) * self.moe.num_experts
        if experts > MOST_EXPERTS_IN_ALL and self.moe.router is not Router.DENSE:
            raise ValueError(
                f"model.layers={self.model.layers} with moe.num_experts={self.moe.num_experts} each are {experts:,} "
                f"experts, and {MOST_EXPERTS_IN_ALL:,} are the most; lower one of them or raise model.moe_every"
            )

    def _check_router(self) -> None:
        model, moe, final = self.model, self.moe, self.router.final_top_k
        if moe.router is Router.ADAPTIVE_CLUSTERING and model.layers // model.moe_every < 2:
            raise ValueError(
                "moe.router=adaptive_clustering looks at the choices of the MoE layer before, so it needs two or more: "
                f"raise model.layers={model.layers} or lower model.moe_every={model.moe_every}"
            )
        if moe.router is Router.SMOE_DROPOUT and final and not moe.top_k <= final <= moe.num_experts:
            raise ValueError(
                f"router.final_top_k={final} must lie between moe.top_k={moe.top_k} and "
                f"moe.num_experts={moe.num_experts}"
            )

"""Sections of the run configuration that describe a run: training, data, fine-tuning, and what is written when."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import field_validator

from vqmoe_ds.config.fields import (
    LARGEST_SEED,
    LARGEST_WEIGHT,
    LONGEST_WAIT,
    MOST_CORPUS,
    MOST_FEATURES,
    MOST_STEPS,
    MOST_TOGETHER,
    MOST_TOKENS,
    Section,
    option,
)


class SequencePlacement(StrEnum):
    """Values of ``train.sp_placement``."""

    POSITION = "position"
    EXPERT = "expert"


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


class Augment(StrEnum):
    NONE = "none"
    CROP = "crop"
    CROP_FLIP = "crop_flip"
    RAND = "rand"


class LogTo(StrEnum):
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"


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
    extended_rate: float = option(
        0.0, "learning rate of its end, filled in by the run; 0: by its schedule", ge=0, le=LARGEST_WEIGHT
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


def hub_source(source: str) -> str:
    """``hf:NAME``, ``hf:NAME:SPLIT`` and ``hf:NAME:CONFIG:SPLIT`` as ``hub:`` has them; any other source as it is."""
    if not source.startswith("hf:"):
        return source
    name, *rest = source.removeprefix("hf:").split(":")
    return ":".join(["hub", name, *([""] if len(rest) == 1 else []), *rest])


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
        None,
        "tokenizer of text that is prepared when the run starts, or of prepared data that has no PREFIX.json: bytes, a "
        "folder, a .model or a vocabulary .txt; none: text is read as it is, byte by byte",
    )
    text_key: str = option("text", "text prepared at the start: JSON key or table column that holds it")
    max_tokens: int | None = option(
        None,
        "text prepared at the start: take the first so many tokens; of a hub's set no more is downloaded; none: all",
        "tokens",
        ge=1,
        le=MOST_CORPUS,
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

    @field_validator("path", "valid_path")
    @classmethod
    def _hub(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list):
            return [hub_source(one) for one in value]
        return None if value is None else hub_source(value)


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

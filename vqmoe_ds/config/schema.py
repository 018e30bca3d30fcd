"""The typed run configuration: every option, its unit, its default and its meaning.

Presets (``config/presets/*.yaml``), ``--config FILE.yaml`` and ``--set section.field=value`` fill it in that
order. What DeepSpeed owns (ZeRO, precision, offload, expert-parallel size) stays in the DeepSpeed JSON, where
``"auto"`` means "as in this configuration". The sections are in ``model.py`` and ``training.py``.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, FieldSerializationInfo, ValidationInfo, field_serializer, field_validator, model_validator

from vqmoe_ds.config.fields import MOST_EXPERTS_IN_ALL, Section
from vqmoe_ds.config.model import (
    CodebookConfig,
    CodeMap,
    CodeSource,
    ModelConfig,
    MoEConfig,
    QKNorm,
    RopeScaling,
    SoftmaxOver,
    Stem,
)
from vqmoe_ds.config.routers import LooksAhead, RouterOptions, options_for
from vqmoe_ds.config.training import (
    Augment,
    DataConfig,
    Extension,
    FinetuneConfig,
    LogTo,
    OutputConfig,
    Pool,
    Precision,
    SequencePlacement,
    Trainable,
    TrainConfig,
)
from vqmoe_ds.runtime.errors import ConfigError

__all__ = [
    "Augment",
    "CodeMap",
    "CodeSource",
    "CodebookConfig",
    "DataConfig",
    "Extension",
    "FinetuneConfig",
    "LogTo",
    "MoEConfig",
    "ModelConfig",
    "OutputConfig",
    "Pool",
    "Precision",
    "QKNorm",
    "RopeScaling",
    "RunConfig",
    "SequencePlacement",
    "SoftmaxOver",
    "Stem",
    "TrainConfig",
    "Trainable",
]


class RunConfig(Section):
    """Everything about one run."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    # Behind moe: fields are validated in this order, and moe.router decides which options there are. The default is
    # validated to become those of the router, too.
    router: RouterOptions = Field(default_factory=RouterOptions, validate_default=True)
    codebook: CodebookConfig = CodebookConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    run: OutputConfig = OutputConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    # Plain, for pydantic would hold the options against RouterOptions, which has no fields and refuses every name.
    @field_validator("router", mode="plain")
    @classmethod
    def _options_of_the_router(cls, given: Any, info: ValidationInfo) -> RouterOptions:
        # None where moe itself is wrong: that is the error to report, not options that do not fit its default.
        moe = info.data.get("moe")
        return options_for((moe or MoEConfig()).router, given if moe is not None else {})

    # pydantic writes the fields of the declared class, and RouterOptions has none.
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
                raise ValueError(f"{given} is for images (model.image_size); set it to 0")
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

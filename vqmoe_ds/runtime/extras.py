"""Libraries that come with an extra of the package (pyproject.toml), imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vqmoe_ds.runtime.errors import ConfigError, UserError

EXTRAS = {
    "alembic": ("alembic", "mlflow"),
    "datasets": ("datasets", "data"),
    "PIL": ("pillow", "images"),
    "google": ("protobuf", "data"),
    "lm_eval": ("lm-eval", "eval"),
    "matplotlib": ("matplotlib", "plots"),
    "megatron": ("megatron-core", "megatron"),
    "mlflow": ("mlflow-skinny", "mlflow"),
    "mpi4py": ("mpi4py", "mpi"),
    "peft": ("peft", "lora"),
    "pyarrow": ("pyarrow", "data"),
    "sentencepiece": ("sentencepiece", "data"),
    "shtab": ("shtab", "completion"),
    "sqlalchemy": ("sqlalchemy", "mlflow"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "textblob": ("textblob", "pos"),
    "tokenizers": ("tokenizers", "data"),
    "transformers": ("transformers", "hf"),
    "wandb": ("wandb", "wandb"),
}
"""First part of a module's name -> its package, and the extra that it comes with."""


def library(module: str, purpose: str, refusal: type[UserError] = ConfigError) -> Any:
    """The module; ``purpose`` begins the sentence that is said where its package is missing.

    Raises:
        refusal: the package, or one of another extra that it needs, is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:  # a defect of its installation, not of ours
            raise
        package, extra = EXTRAS[missing]
        raise refusal(
            f"{purpose} needs {package}, which is not installed here: pip install 'vqmoe_ds[{extra}]'"
        ) from None

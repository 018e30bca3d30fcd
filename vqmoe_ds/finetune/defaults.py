"""Defaults of a fine-tuning that are not those of the schema."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, dict[str, Any]] = {
    "train": {"learning_rate": 5e-4, "batch_size": 32, "warmup_steps": 20, "weight_decay": 0.01, "seed": 1},
    "run": {"run_dir": "runs/finetune", "eval_batches": 64, "keep_last": 1, "keep_best": True},
}
LANGUAGE_MODEL_STEPS = 500
FEWEST_STEPS = 1000
"""Steps of a classifier, however few its texts are, unless ``finetune.epochs`` is set."""
SELDOM, OFTEN = 200, 10
"""Validation once an epoch, but at most and at least so many steps apart."""


def shown() -> dict[str, str]:
    """Descriptions of the defaults in ``--help``, by field or by section."""
    numbers = {f"{section}.{name}": str(v) for section, fields in DEFAULTS.items() for name, v in fields.items()}
    same, discrete = "as in the checkpoint", "of a vq model with finetune.discrete"
    return {
        **dict.fromkeys(("model", "moe", "router", "codebook"), same),
        **numbers,
        "moe.top_k": f"{same}; 0 {discrete}",
        "codebook.learning": f"{same}; frozen {discrete}",
        "train.steps": f"finetune.epochs over the texts, unless that is set at least {FEWEST_STEPS}; "
        f"--task lm: {LANGUAGE_MODEL_STEPS}",
        "run.eval_every": f"an epoch, {OFTEN} to {SELDOM} steps; --task lm: a tenth of the steps, at most {SELDOM}",
        "run.save_every": "as run.eval_every",
    }

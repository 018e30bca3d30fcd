"""Learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math

from vqmoe_ds.config.schema import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of the ``step``-th update (from 0): linear warm-up, then a cosine to ``min_learning_rate`` of the peak."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    span = max(1, config.steps - config.warmup_steps)
    done = min(1.0, max(0, step - config.warmup_steps) / span)
    floor = config.min_learning_rate
    return config.learning_rate * warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

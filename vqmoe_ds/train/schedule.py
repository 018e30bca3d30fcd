"""Learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

from vqmoe_ds.config.fields import with_current_names
from vqmoe_ds.config.schema import Extension, TrainConfig

_FIELDS = ("steps", "learning_rate", "warmup_steps", "min_learning_rate_ratio", "extension")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of the ``step``-th update (from 0): linear warm-up, then a cosine to a share of the peak.

    Of a run that was extended (``extended_from``) the steps before have the schedule they had, and those after it the
    rate of its end or a schedule of their own.
    """
    base, peak = config.extended_from, config.learning_rate
    if not base or config.extension is Extension.REPLAN:
        return peak * _share(step, config.steps, config.warmup_steps, config.min_learning_rate_ratio)
    end = _share(base - 1, base, config.warmup_steps, config.min_learning_rate_ratio)
    if step < base:
        return peak * _share(step, base, config.warmup_steps, config.min_learning_rate_ratio)
    if config.extension is Extension.KEEP:
        return peak * end
    anew = _share(step - base, config.steps - base, config.warmup_steps, config.min_learning_rate_ratio)
    warming = step - base < config.warmup_steps
    return peak * (end + (1 - end) * anew if warming else anew)


def _share(step: int, steps: int, warmup_steps: int, floor: float) -> float:
    """Share of the peak rate, in a schedule of so many steps."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    done = min(1.0, max(0, step - warmup_steps) / max(1, steps - warmup_steps))
    return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def continued(saved: dict[str, Any], step: int, config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """The configuration of a run that goes on at ``step``, and a sentence if its learning rate jumps there.

    Args:
        saved: section ``train`` of the checkpoint's configuration.
        step: steps finished.
        config: of this run.
    """
    saved = with_current_names("train", saved)
    then = TrainConfig.model_validate({name: saved[name] for name in saved.keys() & TrainConfig.model_fields.keys()})
    finished = step >= then.steps and config.steps > then.steps
    base = 0 if config.extension is Extension.REPLAN else step if finished else then.extended_from
    config = config.model_copy(update={"extended_from": base})
    if step >= config.steps:
        return config, None
    before, after = learning_rate(step - 1 if finished else step, then), learning_rate(step, config)
    if finished:
        goes_on = f"the finished run of {then.steps} steps goes on to {config.steps}: its learning rate"
        return config, {
            Extension.KEEP: f"{goes_on} stays {before:.3g}",
            Extension.WARMUP: f"{goes_on} rises again from {before:.3g}",
            Extension.REPLAN: f"{goes_on} goes from {before:.3g} to {after:.3g}, as one schedule over all steps has it "
            "(train.extension=keep would hold it, train.extension=warmup warm up again)",
        }[config.extension]
    if math.isclose(before, after, rel_tol=1e-6):
        return config, None
    changed = [f"train.{name}" for name in _FIELDS if getattr(then, name) != getattr(config, name)]
    what = f"the learning rate of step {step + 1} is {after:.3g} instead of {before:.3g}"
    return config, f"{what}, for {' and '.join(changed)} changed"

"""Learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

from vqmoe_ds.config.fields import with_current_names
from vqmoe_ds.config.schema import Extension, TrainConfig

_NEVER = "the learning rate never reaches its peak"
_OWN_PEAK = ("LRRangeTest", "OneCycle", "WarmupDecayLR")
_RISES = {
    "OneCycle": ("cycle_first_step_size", 2000),
    **dict.fromkeys(("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"), ("warmup_num_steps", 1000)),
}
"""Option, and its default, of the steps in which a scheduler of DeepSpeed 0.19.8 rises (``lr_schedules.py``)."""
_FIELDS = ("steps", "learning_rate", "warmup_steps", "min_learning_rate_ratio", "extension")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of the ``step``-th update (from 0): linear warm-up, then a cosine to a share of the peak.

    Of a run that was extended (``extended_from``) the steps before have the schedule they had, and those after it the
    rate of its end or a schedule of their own.
    """
    base, peak = config.extended_from, config.learning_rate
    if not base or config.extension is Extension.REPLAN:
        return peak * _share(step, config.steps, config.warmup_steps, config.min_learning_rate_ratio)
    if step < base:
        return peak * _share(step, base, config.warmup_steps, config.min_learning_rate_ratio)
    # Stored, for a run may have been extended before, or its peak changed.
    end = config.extended_rate or peak * _share(base - 1, base, config.warmup_steps, config.min_learning_rate_ratio)
    if config.extension is Extension.KEEP:
        return end
    anew = _share(step - base, config.steps - base, config.warmup_steps, config.min_learning_rate_ratio)
    warming = step - base < config.warmup_steps
    return end + (peak - end) * anew if warming else peak * anew


def _share(step: int, steps: int, warmup_steps: int, floor: float) -> float:
    """Share of the peak rate, in a schedule of so many steps."""
    # step + 1, for a first step at rate 0 would be lost.
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
    # The checkpoint may be older: fields that are no more are dropped, those that it lacks have their defaults.
    then = TrainConfig.model_validate({name: saved[name] for name in saved.keys() & TrainConfig.model_fields.keys()})
    finished = step >= then.steps and config.steps > then.steps
    before = learning_rate(step - 1 if finished else step, then)
    base, end = (step, before) if finished else (then.extended_from, then.extended_rate)
    if config.extension is Extension.REPLAN:
        base, end = 0, 0.0
    # Kept in later checkpoints: without it the next resume would not know where the extension began.
    config = config.model_copy(update={"extended_from": base, "extended_rate": end})
    if step >= config.steps:
        return config, None
    after = learning_rate(step, config)
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


def misfits(train: TrainConfig, scheduler: dict[str, Any] | None) -> list[str]:
    """Sentences on a schedule that the steps of the run do not fit, and on the one of the DeepSpeed JSON.

    Args:
        train: of the run, as ``continued`` has it.
        scheduler: of the DeepSpeed JSON; where there is one it sets the rate.
    """
    if scheduler is not None:
        return _misfits_of(scheduler, train.steps)
    new = train.steps - train.extended_from
    if new > train.warmup_steps or (train.extended_from and train.extension is Extension.KEEP):
        return []
    what = f"the {new} new steps" if train.extended_from else f"train.steps={train.steps}"
    return [f"{what} end within the warm-up of train.warmup_steps={train.warmup_steps}: {_NEVER}"]


def _misfits_of(scheduler: dict[str, Any], steps: int) -> list[str]:
    kind, params = scheduler["type"], scheduler.get("params", {})
    unread = ["train.warmup_steps", "train.min_learning_rate_ratio"]
    if kind in _OWN_PEAK or (kind == "WarmupLR" and "warmup_max_lr" in params):
        unread.insert(0, "train.learning_rate")
    said = [f"the learning rate is that of {kind} of the DeepSpeed JSON; {', '.join(unread)} are not read"]
    rising, default = _RISES.get(kind, ("", 0))
    warmup, total = params.get(rising, default), params.get("total_num_steps", steps)
    if isinstance(warmup, int | float) and steps <= warmup:
        said.append(f"train.steps={steps} end within {rising}={warmup:g} of {kind}: {_NEVER}")
    if isinstance(total, int | float) and total < steps:
        said.append(f"{kind} ends at total_num_steps={total:g} of train.steps={steps}: it stays at its lowest rate")
    return said

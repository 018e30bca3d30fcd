"""The optimizer's parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn


def decays(name: str, dimensions: int, decay_gates: bool = True) -> bool:
    """Whether weight decay falls on a parameter: on matrices, but on those of routers only with ``train.decay_gates``.

    Checkpoints list parameters in the order of the groups, so whoever reads or lays one out asks here too.
    """
    return dimensions >= 2 and (decay_gates or ".router." not in name)


def parameter_groups(model: nn.Module, weight_decay: float, decay_gates: bool = True) -> list[dict[str, Any]]:
    """Two named groups of what learns: ``matrices`` decay (``decays``), ``vectors`` do not.

    DeepSpeed splits experts off each by itself.
    """
    learned = [(p, decays(name, p.ndim, decay_gates)) for name, p in model.named_parameters() if p.requires_grad]
    # A list of named groups: DeepSpeed's `configure_moe_param_groups` asserts a list and looks groups up by name.
    groups = [
        {"params": [p for p, decayed in learned if decayed], "weight_decay": weight_decay, "name": "matrices"},
        {"params": [p for p, decayed in learned if not decayed], "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]

"""Costs of a configuration: numbers stored, and FLOPs per token, its router included."""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.flops import forward_flops
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.planning.parameters import meta_model
from vqmoe_ds.runtime.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """Budget of one model.

    ``stored``: learned weights and the state of routers (codes, tables, frozen gates). ``flops``: of a forward pass,
    per token, in products of matrices (two per multiplication), at the mean length of the causal context;
    ``router_flops``: the part of them for routing.
    """

    stored: int
    flops: int
    router_flops: int
    expert_calls: int


def budget_of(config: RunConfig) -> Budget:
    """The budget of a configuration: numbers counted on the model itself, FLOPs by the shapes."""
    network, flops = meta_model(config), forward_flops(config)
    stored = sum(t.numel() for t in [*network.parameters(), *_state(network)])
    return Budget(stored, flops.total, flops.routing, config.rows_per_token)


def check_group(name: str, budgets: dict[str, Budget], yardstick: str, tolerance: float) -> None:
    """Refuse entries that store or compute more or less than the yardstick by more than the tolerance (a share).

    Raises:
        ConfigError: the first such entry, its figure and the yardstick's.
    """
    for field, unit in (("stored", "stored numbers"), ("flops", "FLOPs a token")):
        for entry, budget in budgets.items():
            value, wanted = getattr(budget, field), getattr(budgets[yardstick], field)
            if abs(value - wanted) > tolerance * wanted:
                raise ConfigError(
                    f"unequal budgets in group {name!r}: entry {entry} has {value:,} {unit}, {value / wanted - 1:+.2%} "
                    f"of the {wanted:,} of {yardstick}, and the tolerance is {tolerance:.2%}; make them equal, state "
                    "another tolerance in the grid, or put it into another group"
                )


def _state(network: MoETransformer) -> list:
    # What no checkpoint has (rotary angles, counters of load and use) is no part of what a model stores.
    kept = network.state_dict().keys()
    return [buffer for name, buffer in network.named_buffers() if name in kept]

"""What a configuration costs: numbers stored, and FLOPs a token, its router included.

Legend: D width, N experts, H hidden width of an expert, K codes, C code width, P routing width, S sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_ds.config.schema import CodebookConfig, Router, RunConfig
from vqmoe_ds.errors import ConfigError
from vqmoe_ds.models.transformer import MoETransformer, moe_block_indices
from vqmoe_ds.moe.routers import rows_per_token
from vqmoe_ds.moe.routers.stablemoe import LIGHT_DIM


@dataclass(frozen=True)
class Budget:
    """Of one model.

    ``stored``: learned weights and the state of routers (codes, tables, frozen gates). ``flops``: of a forward pass, a
    token, in products of matrices (two a multiplication), at the mean length of the causal context; ``router_flops`` of
    them for routing.
    """

    stored: int
    flops: int
    router_flops: int
    expert_calls: int


def budget_of(config: RunConfig) -> Budget:
    """Stored numbers are counted on the model itself, FLOPs follow from the shapes."""
    model, moe = config.model, config.moe
    network = MoETransformer(config)
    stored = sum(t.numel() for t in [*network.parameters(), *_state(network)])
    sparse = 0 if moe.router is Router.DENSE else len(moe_block_indices(model))
    calls = rows_per_token(moe, config.router)
    heads = model.attention_width
    attention = 8 * model.width * heads + 2 * heads * (model.sequence_length + 1)
    expert = 6 * model.width * moe.expert_hidden
    dense = 6 * model.width * (model.dense_hidden or calls * moe.expert_hidden)
    routing = sum(router_flops(config, layer) for layer in range(sparse))
    flops = model.layers * attention + sparse * calls * expert + (model.layers - sparse) * dense + routing
    return Budget(stored, flops + 2 * model.width * model.vocab_size, routing, calls)


def router_flops(config: RunConfig, layer: int) -> int:
    """FLOPs a token of the router of one MoE layer: its matrix products (the rest is a few operations a feature)."""
    moe, width, low = config.moe, config.model.width, config.router.low_dim
    gate = 2 * width * moe.num_experts
    if moe.router is Router.VQ:
        return _lookup_flops(config.codebook, width, moe.num_experts, layer) + (gate + 4 * width if moe.top_k else 0)
    if moe.router is Router.XMOE:
        low = low or max(1, moe.num_experts // 2)
        return 2 * low * (width + moe.num_experts)
    if moe.router is Router.STABLEMOE:
        return gate + 2 * (low or LIGHT_DIM) * moe.num_experts
    return 0 if moe.router in (Router.HASH_TOKEN, Router.DENSE) else gate


def _lookup_flops(book: CodebookConfig, width: int, experts: int, layer: int) -> int:
    """Distances to all codes; a projection, where there is one, is counted once, as for a source known ahead."""
    codes, code_width = book.num_codes or experts, book.code_dim or width
    return 2 * codes * code_width + (2 * width * book.code_dim if layer == 0 else 0)


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
    kept = network.state_dict().keys()
    return [buffer for name, buffer in network.named_buffers() if name in kept]

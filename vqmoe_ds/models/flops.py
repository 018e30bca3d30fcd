"""Floating-point operations of a forward pass, by part: products of matrices, two operations a multiplication.

Norms, activations and the embedding, a lookup, are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import moe_block_indices


class Flops(NamedTuple):
    """Operations per token, over all layers, at the mean length of the causal context."""

    attention: int
    experts: int
    dense: int
    """MLPs of the layers without experts."""
    routing: int
    head: int
    """A classifier's is used once per text, and not counted."""

    @property
    def total(self) -> int:
        return sum(self)


def forward_flops(config: RunConfig) -> Flops:
    """FLOPs of a token from the shapes alone; nothing is built."""
    model, moe = config.model, config.moe
    sparse = len(moe_block_indices(model)) if moe.facts.has_experts else 0
    calls, heads = moe.facts.rows_per_token(moe, config.router), model.attention_width
    return Flops(
        attention=model.layers * (8 * model.width * heads + 2 * heads * (model.sequence_length + 1)),
        experts=sparse * calls * 6 * model.width * moe.expert_hidden,
        dense=(model.layers - sparse) * 6 * model.width * (model.dense_hidden or calls * moe.expert_hidden),
        routing=sum(moe.facts.flops(config, layer) for layer in range(sparse)),
        head=0 if config.finetune.classes else 2 * model.width * model.vocab_size,
    )

"""Floating-point operations of a forward pass, by part: products of matrices, two operations a multiplication.

Norms, activations and the embedding, a lookup, are not counted.

Legend: D width, N experts, H hidden width of an expert, K codes, C code width, P routing width.
"""

from __future__ import annotations

from typing import NamedTuple

from vqmoe_ds.config.schema import CodebookConfig, Router, RunConfig
from vqmoe_ds.models.transformer import moe_block_indices
from vqmoe_ds.moe.routers import rows_per_token
from vqmoe_ds.moe.routers.stablemoe import LIGHT_DIM


class Flops(NamedTuple):
    """Of one token, over all layers, at the mean length of the causal context."""

    attention: int
    experts: int
    dense: int
    """MLPs of the layers without experts."""
    routing: int
    head: int
    """A classifier's is used once a text, and not counted."""

    @property
    def total(self) -> int:
        return sum(self)


def forward_flops(config: RunConfig) -> Flops:
    """FLOPs of a token from the shapes alone; nothing is built."""
    model, moe = config.model, config.moe
    sparse = 0 if moe.router is Router.DENSE else len(moe_block_indices(model))
    calls, heads = rows_per_token(moe, config.router), model.attention_width
    return Flops(
        attention=model.layers * (8 * model.width * heads + 2 * heads * (model.sequence_length + 1)),
        experts=sparse * calls * 6 * model.width * moe.expert_hidden,
        dense=(model.layers - sparse) * 6 * model.width * (model.dense_hidden or calls * moe.expert_hidden),
        routing=sum(router_flops(config, layer) for layer in range(sparse)),
        head=0 if config.finetune.classes else 2 * model.width * model.vocab_size,
    )


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
    """Distances to all codes; a projection, where there is one, is counted once, as for a source known ahead.

    Where codes follow from tokens alone each token of a batch is looked up once, so there it is an upper bound.
    """
    codes, code_width = book.num_codes or experts, book.code_dim or width
    return 2 * codes * code_width + (2 * width * book.code_dim if layer == 0 else 0)

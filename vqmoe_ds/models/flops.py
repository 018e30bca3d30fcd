"""Floating-point operations of a forward pass, by part: products of matrices, two operations a multiplication.

Norms, activations and the embedding, a lookup or the stem of images, are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from vqmoe_ds.config.schema import RunConfig


class Flops(NamedTuple):
    """Operations per token, over all layers, at the mean length of the context, which is causal but for images.

    A sliding window shortens the context, whether or not a kernel makes use of it.
    """

    attention: int
    experts: int
    dense: int
    """MLPs of the layers without experts, and shared experts."""
    routing: int
    head: int
    """A classifier's is used once per text or image, and not counted."""

    @property
    def total(self) -> int:
        return sum(self)


def forward_flops(config: RunConfig) -> Flops:
    """FLOPs of a token from the shapes alone; nothing is built."""
    model, moe = config.model, config.moe
    sparse = len(model.moe_blocks) if moe.facts.has_experts else 0
    calls, heads = config.rows_per_token, model.attention_width
    dense = (model.layers - sparse) * config.dense_hidden + sparse * moe.shared_experts * moe.expert_hidden
    length = model.sequence_length
    window = min(model.sliding_window or length, length)
    # `sum_t min(t + 1, window)`: the tokens that each token sees, itself included.
    pairs = length * length if model.image_size else window * (2 * length - window + 1) // 2
    weights = 2 * sparse * model.width if moe.shared_gate else 0
    return Flops(
        # Projections of queries and outputs, and of keys and values; then scores, and the mixture of values, of all
        # pairs.
        attention=model.layers * (4 * model.width * (heads + model.kv_width) + 4 * heads * pairs // length),
        experts=sparse * calls * 6 * model.width * moe.expert_hidden,
        dense=dense * 6 * model.width + weights,
        routing=sum(moe.facts.flops(config, layer) for layer in range(sparse)),
        head=0 if config.finetune.classes or model.image_size else 2 * model.width * model.vocab_size,
    )

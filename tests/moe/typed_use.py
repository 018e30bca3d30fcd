"""The public API as a typed caller uses it; pyproject.toml has mypy check this file strictly."""

from __future__ import annotations

from typing import ClassVar, assert_type

import torch
from torch import Tensor, nn

from vqmoe_ds.moe import (
    CodebookBank,
    CodebookConfig,
    CodebookHealth,
    CodeSource,
    LayerConfig,
    MoEConfig,
    MoELayer,
    RouterOptions,
    Routing,
    RoutingContext,
    StatefulRouter,
    StateSync,
    clip_gradients,
    codebook_health,
    option,
    register_router,
    sync_gradients,
)


@register_router("typed_use")
class LoadRouter(StatefulRouter):
    """Top k of a linear map and of a bias that moves against the load."""

    class Options(RouterOptions):
        rate: float = option(0.5, "how far the bias of an expert moves per step", gt=0, le=1)

    structure: ClassVar[tuple[str, ...]] = ()
    bias_N: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config, config.moe.num_experts)
        self.gate = nn.Linear(config.width, config.moe.num_experts, bias=False)
        self.register_buffer("bias_N", torch.zeros(config.moe.num_experts))

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        weights_Tk, ids_Tk = (self.gate(x_TD) + self.bias_N).topk(self.moe.top_k)
        if self.observing:
            self.observe(ids_Tk.flatten().bincount(minlength=self.moe.num_experts))
        return Routing(ids_Tk, weights_Tk.softmax(-1))

    def learn(self, statistics: Tensor) -> None:
        self.bias_N += self.options.rate * (statistics.mean() - statistics).sign()


def train_once() -> tuple[float, list[CodebookHealth]]:
    """One step of a model of two layers; its loss, and the health of its codebook."""
    codes = LayerConfig(
        16, MoEConfig(num_experts=4), codebook=CodebookConfig(source=CodeSource.LAYER_STATE, num_codes=8)
    )
    loads = LayerConfig(16, MoEConfig(router="typed_use", num_experts=4, top_k=2), {"rate": 0.1}, layer=1)
    layers = [MoELayer(codes), MoELayer(loads)]
    model = nn.ModuleList(layers)
    sync = StateSync(model, accumulation_steps=1)
    sync.broadcast()
    states, loss = torch.randn(2, 3, 16), torch.zeros(())
    for layer in layers:
        answer = layer(states, RoutingContext())
        assert_type(answer, tuple[Tensor, Tensor, Tensor])
        states, loss = states + answer[0], loss + answer[1]
    (loss + states.square().mean()).backward()  # type: ignore[no-untyped-call]  # PyTorch's own
    sync_gradients(model)
    assert_type(clip_gradients(model, 1.0), Tensor)
    sync.step()
    assert_type(sync.in_step(), bool)
    health = codebook_health(model, reset=True)
    assert_type(health, list[CodebookHealth])
    assert_type(health[0].perplexity, float)
    assert_type(CodebookBank(codes.codebook, 1, 4, 16, seed=0).steps_taken, int)
    return loss.item(), health

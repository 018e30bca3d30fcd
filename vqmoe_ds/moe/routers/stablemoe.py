"""Two stages: learn to route, distil the routes into a table of tokens, freeze it.

Legend: T tokens, D width, P low dimension, N experts, V vocabulary, k experts chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.fields import LARGEST_WEIGHT, MOST_FEATURES, MOST_STEPS, option
from vqmoe_ds.config.routers import RouterOptions, register_router
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import (
    Float32Linear,
    Routing,
    RoutingContext,
    auxiliary_loss,
    drawn,
    gathered,
    mean_of_all,
)
from vqmoe_ds.moe.routers.frozen import FreezingRouter
from vqmoe_ds.runtime.errors import ConfigError

LIGHT_DIM = 50
"""Width of the light router's word embeddings unless ``router.low_dim`` is set."""


class LightRouter(nn.Module):
    """``Emb(token) . c_i`` in float32, of the token alone."""

    def __init__(self, vocab_size: int, low_dim: int, num_experts: int, seed: int, layer: int) -> None:
        super().__init__()
        numbers = drawn((vocab_size + num_experts, low_dim), low_dim**-0.5, seed, layer, "light")
        self.words_VP = nn.Parameter(numbers[:vocab_size].clone())
        self.experts_NP = nn.Parameter(numbers[vocab_size:].clone())

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return F.embedding(token_ids_T, self.words_VP).float() @ self.experts_NP.float().t()

    @torch.no_grad()
    def table(self, top_k: int) -> Tensor:
        """Experts of every token of the vocabulary, int64 ``[V, k]``; all ranks must call it together."""
        with gathered(self):
            return (self.words_VP.float() @ self.experts_NP.float().t()).topk(top_k, dim=-1).indices


@register_router("stablemoe")
class StableMoERouter(FreezingRouter):
    """StableMoE (Dai 2022).

    Stage 1: ``s = E x``, experts TopK s, weights ``sigmoid(s_i)``, a balance loss, and a light router
    ``D = softmax(Emb(token) . c_i)`` learns the choices by cross-entropy. After ``router.distil_steps`` optimizer steps
    stage 2 begins: the experts of a token are TopK of D, frozen; the weights ``sigmoid(s_i)`` go on learning.

    D is a function of the token id, so at the change it becomes a table in a buffer: neither Adam's momentum nor weight
    decay can move it any more.
    """

    class Options(RouterOptions):
        low_dim: int = option(
            0, "width of the light router's word embeddings; 0: 50", "features", ge=0, le=MOST_FEATURES
        )
        distil_steps: int = option(0, "steps of the first stage; 0: a tenth of the run", "steps", ge=0, le=MOST_STEPS)
        distil_weight: float = option(1.0, "weight of the distillation loss", gt=0, le=LARGEST_WEIGHT)

    structure = ("low_dim",)
    needs_token_ids = True
    freeze_option = "distil_steps"
    table_Vk: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        if config.vocab_size < 1:
            raise ConfigError(
                "the stablemoe router keeps a table of tokens: set LayerConfig.vocab_size to their number"
            )
        experts, low_dim = self.moe.num_experts, self.options.low_dim or LIGHT_DIM
        self.gate = Float32Linear(config.width, experts)
        self.light = LightRouter(config.vocab_size, low_dim, experts, config.seed, config.layer)
        # There in the first stage too: checkpoints of both stages fit one model.
        self.register_buffer("table_Vk", torch.zeros(config.vocab_size, self.moe.top_k, dtype=torch.int64))

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return super().flops(run, layer) + 2 * (getattr(run.router, "low_dim", 0) or LIGHT_DIM) * run.moe.num_experts

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        if context.token_ids_T is None:
            raise ValueError("the stablemoe router needs the token ids of its layer's input")
        scores_TN = self.gate(x_TD)
        log_light_TN = self.light(context.token_ids_T).log_softmax(dim=-1)
        if self.is_frozen:
            ids_Tk = self.table_Vk[context.token_ids_T]
            # Nothing, with a gradient of 0: engines wait for the gradient of every weight.
            aux = 0.0 * log_light_TN.sum()
        else:
            ids_Tk = scores_TN.topk(self.moe.top_k, dim=-1).indices
            distillation = -mean_of_all(log_light_TN.gather(1, ids_Tk), context.mean_tokens)
            aux = auxiliary_loss(scores_TN, ids_Tk, self.moe, context) + self.options.distil_weight * distillation
        return Routing(ids_Tk, scores_TN.gather(1, ids_Tk).sigmoid(), aux)

    def freeze(self) -> None:
        self.table_Vk.copy_(self.light.table(self.moe.top_k))

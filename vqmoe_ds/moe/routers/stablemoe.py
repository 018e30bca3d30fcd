"""Two stages: learn to route, distil the routes into a table of tokens, freeze it.

Legend: T tokens, D width, P low dimension, N experts, V vocabulary, k experts chosen.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.schema import MoEConfig, RouterConfig
from vqmoe_ds.moe.mirror import HostMirror
from vqmoe_ds.moe.routers.base import (
    Float32Linear,
    KnownRoute,
    Routing,
    StatefulRouter,
    auxiliary_loss,
    drawn,
)

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
        with _gathered(self):
            return (self.words_VP.float() @ self.experts_NP.float().t()).topk(top_k, dim=-1).indices


class StableMoERouter(StatefulRouter):
    """StableMoE (Dai 2022).

    Stage 1: ``s = E x``, experts TopK s, weights ``sigmoid(s_i)``, a balance loss, and a light router
    ``D = softmax(Emb(token) . c_i)`` learns the choices by cross-entropy. After ``router.distil_steps`` optimizer steps
    stage 2 begins: the experts of a token are TopK of D, frozen; the weights ``sigmoid(s_i)`` go on learning.

    D is a function of the token id, so at the change it becomes a table in a buffer: neither Adam's momentum nor weight
    decay can move it any more.
    """

    table_Vk: Tensor
    frozen: Tensor
    """Whether stage 2 has begun. Kept, because a longer or shorter run that goes on has another ``distil_steps``."""

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        options: RouterConfig,
        seed: int,
        layer: int,
        vocab_size: int,
        steps: int,
    ) -> None:
        super().__init__(0)
        self.config, self.options = config, options
        self.distil_steps = options.distil_steps or max(1, steps // 10)
        self.gate = Float32Linear(width, config.num_experts)
        self.light = LightRouter(vocab_size, options.low_dim or LIGHT_DIM, config.num_experts, seed, layer)
        self.register_buffer("table_Vk", torch.zeros(vocab_size, config.top_k, dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.int64))
        self._frozen = HostMirror()

    @property
    def in_second_stage(self) -> bool:
        """``frozen`` as a truth value."""
        return bool(self._frozen.read(self.frozen))

    def forward(self, x_TD: Tensor, known: KnownRoute | None = None) -> Routing:
        if known is None or known.token_ids_T is None:
            raise ValueError("the stablemoe router needs the token ids of its layer's input")
        scores_TN = self.gate(x_TD)
        log_light_TN = self.light(known.token_ids_T).log_softmax(dim=-1)
        if self.in_second_stage:
            ids_Tk = self.table_Vk[known.token_ids_T]
            # Nothing, with a gradient of 0: engines wait for the gradient of every weight.
            aux = 0.0 * log_light_TN.sum()
        else:
            ids_Tk = scores_TN.topk(self.config.top_k, dim=-1).indices
            distillation = -log_light_TN.gather(1, ids_Tk).mean()
            aux = auxiliary_loss(scores_TN, ids_Tk, self.config) + self.options.distil_weight * distillation
        return Routing(ids_Tk, scores_TN.gather(1, ids_Tk).sigmoid(), aux)

    def learn(self, statistics: Tensor) -> None:
        if not self.in_second_stage and self.steps_taken + 1 >= self.distil_steps:
            self.table_Vk.copy_(self.light.table(self.config.top_k))
            self._frozen.write(self.frozen, 1)


def _gathered(module: nn.Module) -> AbstractContextManager[object]:
    """Whole weights where ZeRO-3 holds them in pieces."""
    weights = list(module.parameters())
    if not hasattr(weights[0], "ds_id"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(weights)
    return context

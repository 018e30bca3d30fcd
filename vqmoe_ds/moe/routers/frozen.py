"""Routers that never learn, or no longer: a random gate, alone or with more and more experts per token; a learned one.

Legend: T tokens, D width, N experts, k experts chosen.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.config.fields import LARGEST_WEIGHT, MOST_EXPERTS, MOST_STEPS, option
from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.mirror import HostMirror
from vqmoe_ds.moe.routers.base import (
    Float32Linear,
    Routing,
    RoutingContext,
    StatefulRouter,
    TopKOptions,
    auxiliary_loss,
    choose,
    drawn,
    gathered,
    softmax_over_all,
)


@register_router("random_frozen")
class RandomFrozenRouter(StatefulRouter):
    """TopK of ``softmax(W x)`` with a random ``W`` that stays: the control of every learned router (Chen 2023).

    Weights are the softmax over the chosen, so 1 at k = 1: there is no gate to teach. ``W`` is a float32 buffer, so
    bfloat16, the optimizer and its weight decay leave it alone.
    """

    class Options(TopKOptions):
        gate_scale: float = option(
            1.0,
            "size of the frozen gate: the deviation of its logits over states of unit size (the authors' is 0.32)",
            gt=0,
            le=LARGEST_WEIGHT,
        )

    structure = ("softmax_over", "gate_scale")
    gate_ND: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        shape, scale = (self.moe.num_experts, config.width), self.options.gate_scale * config.width**-0.5
        # The buffers of a stateful router are broadcast from rank 0 and compared by `StateSync`, which also counts the
        # steps that smoe_dropout grows by.
        self.register_buffer("gate_ND", drawn(shape, scale, config.seed, config.layer, "gate", dtype=torch.float32))

    @property
    def top_k(self) -> int:
        """Experts a token is sent to now."""
        return self.moe.top_k

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TN = x_TD.float() @ self.gate_ND.float().t()
        over_all = softmax_over_all(self.options.softmax_over, self.top_k, learned=False)
        return Routing(*choose(logits_TN, self.top_k, over_all))


@register_router("smoe_dropout")
class SMoEDropoutRouter(RandomFrozenRouter):
    """SMoE-Dropout (Chen 2023): a frozen random gate whose k grows linearly over training.

    ``k(t) = round(k_0 + (k_1 - k_0) t / steps)`` with ``k_0 = moe.top_k`` and ``k_1 = router.final_top_k``, t the
    optimizer steps taken, which is kept in the checkpoint. Evaluation uses the k of its moment.
    """

    class Options(RandomFrozenRouter.Options):
        final_top_k: int = option(0, "moe.top_k grows to this; 0: all experts", "experts", ge=0, le=MOST_EXPERTS)
        growth_steps: int = option(0, "steps over which it grows; 0: the whole run", "steps", ge=0, le=MOST_STEPS)

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.growth_steps = self.options.growth_steps or config.steps

    @classmethod
    def check(cls, run: RunConfig) -> None:
        first, last = run.moe.top_k, cls._final(run.moe, run.router)
        if not first <= last <= run.moe.num_experts:
            raise ValueError(
                f"router.final_top_k={last} must lie between moe.top_k={first} and "
                f"moe.num_experts={run.moe.num_experts}"
            )

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return -(-(moe.top_k + cls._final(moe, options)) // 2)

    @classmethod
    def with_schedules(cls, options: Any, steps: int) -> Any:
        return options.model_copy(update={"growth_steps": options.growth_steps or steps})

    @staticmethod
    def _final(moe: MoEConfig, options: Any) -> int:
        """Experts per token at the end of the growth."""
        return options.final_top_k or moe.num_experts

    def experts_of_tokens(self, routing: Routing, tokens: int) -> Tensor:
        # Choices are sorted by weight, so the first ones keep their meaning, and the shape, while k grows.
        return routing.expert_ids_TR[:, : self.moe.top_k]

    @property
    def top_k(self) -> int:
        # `steps_taken` moves in `StateSync.step` alone: all micro-batches of a step, and their recomputation, have one
        # k.
        first, last = self.moe.top_k, self._final(self.moe, self.options)
        done = min(1.0, self.steps_taken / max(1, self.growth_steps))
        # Half up; round() would take the even number.
        return int(first + (last - first) * done + 0.5)


class FreezingRouter(StatefulRouter):
    """Base of routers that learn for some optimizer steps, and keep what they have learned from then on."""

    frozen: Tensor
    """Whether that step is behind. Saved, because a longer or shorter run that goes on has another one."""
    freeze_option: ClassVar[str]
    """The option that names the step; 0 there: a tenth of the run."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.freeze_step: int = getattr(self.with_schedules(self.options, config.steps), self.freeze_option)
        self.register_buffer("frozen", torch.zeros((), dtype=torch.int64))
        self._frozen = HostMirror()

    @classmethod
    def with_schedules(cls, options: Any, steps: int) -> Any:
        step = getattr(options, cls.freeze_option) or max(1, steps // 10)
        return options.model_copy(update={cls.freeze_option: step})

    @property
    def is_frozen(self) -> bool:
        """``frozen`` as a truth value."""
        return bool(self._frozen.read(self.frozen))

    def learn(self, statistics: Tensor) -> None:
        # The same on all ranks, for `freeze` may gather weights. Not `==`: a run that goes on with another length may
        # have its freeze_step behind it already.
        if not self.is_frozen and self.steps_taken + 1 >= self.freeze_step:
            self.freeze()
            self._frozen.write(self.frozen, 1)

    def freeze(self) -> None:
        """Take what was learned into buffers; all ranks call it together."""
        raise NotImplementedError


class KeptLinear(Float32Linear):
    """A ``Float32Linear`` that may compute with a copy of its weights from some moment."""

    def forward(self, x_TD: Tensor, kept_ND: Tensor | None = None) -> Tensor:
        if kept_ND is None:
            return super().forward(x_TD)
        # A gradient of 0 for the weights that nothing reads: engines wait for the gradient of every weight.
        return F.linear(x_TD.float(), kept_ND.float() + 0.0 * self.weight.float())


@register_router("topk_frozen")
class FrozenTopKRouter(FreezingRouter):
    """The learned linear router, which stops learning after ``router.freeze_step`` optimizer steps.

    Until then it is ``topk``, losses included. From then on the gate is the copy in a buffer, which neither Adam's
    momentum nor weight decay can move, and there is no balance loss. States go on moving, so routes may still change:
    the control that says how much of a lead is a router that stands still.
    """

    class Options(TopKOptions):
        freeze_step: int = option(
            0, "optimizer step from which the gate no longer moves; 0: a tenth of the run", "steps", ge=0, le=MOST_STEPS
        )

    structure = ("softmax_over",)
    freeze_option = "freeze_step"
    kept_ND: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.over_all = softmax_over_all(self.options.softmax_over, self.moe.top_k)
        self.gate = KeptLinear(config.width, self.moe.num_experts)
        self.register_buffer("kept_ND", torch.zeros(self.moe.num_experts, config.width, dtype=torch.float32))

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TN = self.gate(x_TD, self.kept_ND if self.is_frozen else None)
        ids_Tk, weights_Tk = choose(logits_TN, self.moe.top_k, self.over_all)
        aux = None if self.is_frozen else auxiliary_loss(logits_TN, ids_Tk, self.moe, context)
        return Routing(ids_Tk, weights_Tk, aux)

    def freeze(self) -> None:
        with gathered(self.gate), torch.no_grad():
            self.kept_ND.copy_(self.gate.weight)

"""The one file that touches DeepSpeed's internal expert-parallel layer (AutoEP, pinned to 0.19.8).

The engine recognises expert parallelism by ``isinstance(module, AutoEPMoELayer)``. Subclassing it brings ZeRO 0-3,
right gradient averaging and clipping of experts, per-expert checkpoint files and universal checkpoints.
Its constructor copies weights out of a Hugging Face block, so we skip it and set what the engine reads;
``tests/moe/test_deepspeed_contract.py`` names the attribute when a new DeepSpeed reads something else.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.expert_store import StoredExperts
from vqmoe_ds.moe.gradients import clip_gradients, gradient_norm
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.runtime.errors import ConfigError


class DeepSpeedMoELayer(MoELayer, AutoEPMoELayer):
    """The ``MoELayer`` as DeepSpeed's engine knows it: the engine binds its expert-parallel group."""

    # The engine saves experts apart, and loads each rank's into the one state_dict that rank 0 saved.
    notes_experts = False

    def __init__(self, config: LayerConfig) -> None:
        MoELayer.__init__(self, config)
        self.hidden_size = config.width
        # The key under which deepspeed.utils.groups makes and finds the group.
        self.ep_group_name = f"ep_size_{self.ep_size}"
        self.folding_group_handles = None
        self.tp_group = None
        self.comm_backend = "comm"
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, self.ep_size
        )
        self._tag_experts()

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        """Called by the engine: bind the expert-parallel group, and see that this rank holds its experts.

        Raises:
            ConfigError: the group orders its ranks otherwise than the experts were dealt out.
        """
        AutoEPMoELayer.set_deepspeed_parallelism(self, use_data_before_expert_parallel_, folding_group_handles)
        # Experts were drawn for ep_rank before the engine made its groups; another order would permute them silently.
        place = dist.get_rank(group=self.ep_group)
        if place != self.ep_rank:
            raise ConfigError(
                f"rank {dist.get_rank()} was built with the experts of place {self.ep_rank} but stands at place "
                f"{place} of its expert-parallel group; build the model with ep_rank={place}"
            )

    def _tag_experts(self) -> None:
        """Mark expert parameters for expert-data-parallel reduction, ZeRO-3 placement and universal checkpoints."""
        # The marks that AutoEPMoELayer's constructor sets. Other weights need none: without them DeepSpeed takes a
        # weight for a replicated one.
        placement = self.expert_placement_descriptor
        for param in (self.experts.w1, self.experts.w2, self.experts.w3):
            logical_shape = [self.num_experts, *param.shape[1:]]
            universal = {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
                AUTOEP_PARAM_EP_RANK: self.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
            }
            setattr(param, DS_AUTOEP_UC_META, universal)
            # allreduce=False: an expert's gradient is averaged over the ranks that hold a copy of it, and no others.
            tags = {
                "allreduce": False,
                "group_name": self.ep_group_name,
                "ds_zero_placement_family": "autoep_expert",
                "ds_zero_partition_group_name": self.ep_group_name,
            }
            for name, value in tags.items():
                setattr(param, name, value)


class StoredDeepSpeedMoELayer(DeepSpeedMoELayer):
    """A ``DeepSpeedMoELayer`` whose experts are frozen and lie in an ``ExpertStore``."""

    experts_class = StoredExperts


def clip_over_all_experts(engine: Any) -> None:
    """Let an engine at ZeRO stage 0 clip by the norm of all gradients, and report that norm.

    DeepSpeed 0.19.8 averages the norms of the ranks in float32, although each rank holds its own experts only, so the
    limit that acts depends on the layout (its issue #8475); in 16 bits it leaves experts out of the norm. Stages 1 to 3
    are right by themselves. An engine does it by itself where its model has a ``DeepSpeedMoELayer`` and DeepSpeed's
    norm would be wrong; doing it twice is doing it once.
    """

    def clip() -> None:
        engine._global_grad_norm = clip_gradients(engine.module, engine.gradient_clipping())

    # DeepSpeed calls it at the boundary of accumulation, when gradients are reduced, on all ranks: it has a collective.
    engine.clip_fp32_gradients = clip
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        unscale = type(optimizer).unscale_and_clip_grads

        def unscale_and_clip(norm: Any, *args: Any, **options: Any) -> Any:
            # Of scaled gradients, like the norm that it replaces. The engine copies it from the optimizer after the
            # step.
            optimizer._global_grad_norm = gradient_norm(engine.module)[0]
            return unscale(optimizer, optimizer._global_grad_norm, *args, **options)

        optimizer.unscale_and_clip_grads = unscale_and_clip


_configure_optimizer = DeepSpeedEngine._configure_optimizer


def _configure_optimizer_and_clipping(engine: Any, *args: Any, **options: Any) -> None:
    _configure_optimizer(engine, *args, **options)
    layers = [module for module in engine.module.modules() if isinstance(module, DeepSpeedMoELayer)]
    wrong = isinstance(engine.optimizer, FP16_UnfusedOptimizer) or any(layer.ep_size > 1 for layer in layers)
    if layers and wrong and not engine.zero_optimization():
        clip_over_all_experts(engine)


# The engine tells the layer of its groups before it has an optimizer, and never who it is: no hook of the layer's could
# do this, and a line that every loop had to add would be forgotten, for a wrong norm says nothing.
DeepSpeedEngine._configure_optimizer = _configure_optimizer_and_clipping

"""What ``vqmoe_ds/moe/deepspeed_layer.py`` and ``deepspeed_gate.py`` lean on inside DeepSpeed 0.19.8.

These classes are internal to DeepSpeed. When a new version breaks one of these tests, its message says what moved.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.checkpoint import autoep_affine, constants, universal_checkpoint
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe import sharded_moe
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import nn

from tests.distributed import RankFailure, run_ranks
from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer


def _layer(ep_size: int = 2, ep_rank: int = 1) -> DeepSpeedMoELayer:
    return DeepSpeedMoELayer(
        LayerConfig(6, MoEConfig(router="topk", num_experts=8, expert_hidden=10), ep_size=ep_size, ep_rank=ep_rank)
    )


def _engine_functions() -> dict[str, ast.FunctionDef]:
    """Functions of the engine that ask for an AutoEPMoELayer."""
    tree = ast.parse(inspect.getsource(engine_module))
    return {
        function.name: function
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        and any(isinstance(node, ast.Name) and node.id == "_AutoEPMoELayer" for node in ast.walk(function))
    }


def test_version_is_the_pinned_one() -> None:
    assert deepspeed.__version__.split("+")[0] == "0.19.8", (
        "another DeepSpeed: run the whole of tests/ and tools on checkpoints before the pin in requirements.txt moves"
    )


def test_engine_recognises_the_layer_by_class_in_the_places_known() -> None:
    known = {
        "_configure_distributed_model",
        "_validate_zero3_moe_compatibility",
        "_get_non_moe_state_dict",
        "_save_moe_checkpoint",
        "load_moe_state_dict",
        "_load_checkpoint",
        "_validate_autoep_zero3_partitioned_metadata",
        "_autoep_expert_parameter_names",
        "_has_autoep_layers",
    }
    found = set(_engine_functions())
    assert found == known, (
        f"isinstance(module, AutoEPMoELayer) moved: new in {found - known}, gone from {known - found}"
    )


def test_layer_has_every_attribute_the_engine_reads() -> None:
    layer = _layer()
    of_native_moe = {"expert_group_name", "wall_clock_breakdown", "group"}
    for name, function in _engine_functions().items():
        read = {
            node.attr
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "module"
        }
        missing = {attribute for attribute in read - of_native_moe if not hasattr(layer, attribute)}
        assert not missing, f"DeepSpeedEngine.{name} now reads {sorted(missing)} of an AutoEPMoELayer"


def test_binding_of_groups_reads_only_what_we_set() -> None:
    source = textwrap.dedent(inspect.getsource(AutoEPMoELayer.set_deepspeed_parallelism))
    read = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    folding_only = {"combine_impl"}
    missing = {attribute for attribute in read - folding_only if not hasattr(_layer(), attribute)}
    assert not missing, f"AutoEPMoELayer.set_deepspeed_parallelism now reads {sorted(missing)}"
    parameters = list(inspect.signature(AutoEPMoELayer.set_deepspeed_parallelism).parameters.values())
    assert [(p.name, p.default) for p in parameters[1:]] == [
        ("use_data_before_expert_parallel_", False),
        ("folding_group_handles", None),
    ], "the signature of AutoEPMoELayer.set_deepspeed_parallelism changed"


def test_class_adds_nothing_behind_our_back() -> None:
    """We skip its constructor; hooks on nn.Module's own machinery would then run on a half-built layer."""
    special = {"__init_subclass__", "__getattr__", "__setattr__", "_load_from_state_dict", "_save_to_state_dict",
               "state_dict", "load_state_dict", "_apply", "__call__"}  # fmt: skip
    assert not special & set(vars(AutoEPMoELayer)), "AutoEPMoELayer overrides nn.Module machinery"
    assert AutoEPMoELayer.__mro__[1] is nn.Module, "AutoEPMoELayer has a new base class"


def test_placement_functions() -> None:
    descriptor = autoep_affine.legacy_uniform_autoep_placement_descriptor(8, 4, 2)
    assert descriptor["num_experts"] == 8, "the placement descriptor lost num_experts"
    assert list(autoep_affine.autoep_experts_for_rank(descriptor, 1)) == [4, 5, 6, 7], (
        "DeepSpeed no longer deals experts to ranks in blocks"
    )
    mapping = autoep_affine.autoep_placement_to_affine_map(descriptor, [8, 10, 6]).to_dict()
    assert isinstance(mapping, dict), "the affine map of a parameter is no longer a dictionary"


def test_parameters_carry_what_reduction_zero3_and_universal_checkpoints_read() -> None:
    layer = _layer()
    for name in ("w1", "w2", "w3"):
        param = getattr(layer.experts, name)
        assert param.allreduce is False and param.group_name == "ep_size_2"
        assert param.ds_zero_placement_family == "autoep_expert"
        assert param.ds_zero_partition_group_name == "ep_size_2"
        meta = getattr(param, constants.DS_AUTOEP_UC_META)
        required = {
            constants.AFFINE_MAP,
            constants.AUTOEP_EXPERT_PLACEMENT,
            constants.AUTOEP_PARAM_LOGICAL_SHAPE,
            constants.AUTOEP_PARAM_EP_RANK,
            constants.AUTOEP_PARAM_LOCAL_EXPERTS,
        }
        assert required <= meta.keys()
        whole = torch.arange(8.0).view(8, 1, 1).expand(8, *param.shape[1:])
        part = universal_checkpoint._resolve_autoep_partition(param, {constants.EP_NUM_EXPERTS: 8}, whole, 1)
        assert part[:, 0, 0].tolist() == [4, 5, 6, 7], f"universal checkpoints give rank 1 other rows of {name}"
    engine_source = inspect.getsource(engine_module)
    for attribute in ("ds_zero_placement_family", "ds_zero_partition_group_name", "autoep_expert"):
        assert attribute in engine_source, f"the engine no longer reads {attribute}"
    assert r".*\.experts\.w[123]$" in engine_source, "universal checkpoints know experts by other names"


def test_engine_clips_float32_gradients_where_we_step_in() -> None:
    source = inspect.getsource(DeepSpeedEngine._take_model_step)
    assert "self.clip_fp32_gradients()" in source, "ZeRO 0 clips elsewhere: clip_over_all_experts no longer acts"
    assert "_global_grad_norm" in inspect.getsource(DeepSpeedEngine.get_global_grad_norm)
    made = "self._configure_optimizer(optimizer, model_parameters)" in inspect.getsource(DeepSpeedEngine.__init__)
    assert made, "engines make their optimizers elsewhere: clip_over_all_experts is no longer installed"


def test_native_layer_calls_its_gate_as_vqgate_answers() -> None:
    source = " ".join(inspect.getsource(sharded_moe.MOELayer.forward).split())
    assert (
        "C, E, indices_, locations_, gates_, self.exp_counts = self.gate( reshaped_input, input[1], True" in source
    ), "MOELayer calls its gate otherwise: VQGate.forward must follow"
    assert "self.gate._set_ep_group(ep_group)" in inspect.getsource(sharded_moe.MOELayer._set_ep_group)


# ------------------------------------------------------------------- on real ranks


def _model(ep_size: int, rank: int) -> MoETransformer:
    config = RunConfig(
        model={"layers": 2, "width": 16, "heads": 2, "sequence_length": 8, "vocab_size": 16},
        moe={"num_experts": 4, "expert_hidden": 8, "top_k": 0},
    )
    return MoETransformer(config, ep_size, rank % ep_size, DeepSpeedMoELayer)


def _engine(model: MoETransformer, stage: int, **more: Any) -> DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        **more,
    }
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def _what_the_engine_sees(rank: int, world: int) -> dict[str, Any]:
    model = _model(2, rank)
    before = [layer.ep_group for layer in model.moe_layers()]
    engine = _engine(model, 1)
    layer = model.moe_layers()[0]
    optimizer_groups = [group.get("moe", False) for group in engine.optimizer.param_groups]
    plain = _engine(_model(2, rank), 0)
    return {
        "unbound before": before == [None, None],
        "has_moe_layers": engine.has_moe_layers,
        "num_experts": engine.num_experts,
        "bound": layer.ep_group is groups._get_expert_parallel_group("ep_size_2"),
        "ep_ranks": dist.get_process_group_ranks(layer.ep_group),
        "edp_ranks": dist.get_process_group_ranks(groups._get_expert_data_parallel_group("ep_size_2")),
        "place": dist.get_rank(layer.ep_group) == layer.ep_rank,
        "moe group": sorted(optimizer_groups) == [False, True],
        "norm": _one_step(plain) > 0,
    }


def _one_step(engine: DeepSpeedEngine) -> float:
    tokens_BS = torch.randint(0, 16, (2, 9))
    loss, aux = engine(tokens_BS[:, :-1], tokens_BS[:, 1:])
    engine.backward(loss + aux)
    engine.step()
    return float(engine.get_global_grad_norm())


def test_engine_binds_groups_and_splits_the_optimizer() -> None:
    for rank, seen in enumerate(run_ranks(4, _what_the_engine_sees)):
        assert seen.pop("num_experts") == [4, 4], "the engine does not find our layers"
        assert seen.pop("ep_ranks") == [[0, 1], [2, 3]][rank // 2], "expert-parallel groups are no longer neighbours"
        assert seen.pop("edp_ranks") == [[0, 2], [1, 3]][rank % 2], "expert-data-parallel groups changed"
        assert all(seen.values()), [name for name, true in seen.items() if not true]


def _other_order(rank: int, world: int) -> None:
    _engine(_model(2, rank), 1, use_data_before_expert_parallelism=True)


def test_another_order_of_ranks_is_refused() -> None:
    """Without the refusal, two ranks would hold the same experts and two sets of experts would be nowhere."""
    with pytest.raises(RankFailure, match=r"rank [12] was built .*build the model with ep_rank"):
        run_ranks(4, _other_order)

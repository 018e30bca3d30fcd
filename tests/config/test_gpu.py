"""What GPUs ask of a configuration: widths that PyTorch's grouped products take, bf16 and fused Adam."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vqmoe_ds.config.cli import build_parser as pretrain_parser
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.gpu import WIDTH_STEP, attention_hint, check_widths
from vqmoe_ds.config.load import load_config
from vqmoe_ds.planning import command as plan
from vqmoe_ds.planning import dry_run
from vqmoe_ds.runtime.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolved(folder: Any, values: dict[str, Any], gpu: bool = True, **overrides: Any) -> EngineConfig:
    path = folder / "ds.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, **values}))
    return resolve(
        str(path), load_config("tiny", None, {k.replace("__", "."): v for k, v in overrides.items()}), 1, gpu=gpu
    )


# ---------------------------------------------------------------- widths


@pytest.mark.parametrize("precision", DTYPES)
def test_the_step_of_widths_is_that_of_the_grouped_product(precision):
    """The rule is PyTorch's, which holds on CPU as well; forward, and the products of the backward pass."""
    step, dtype = WIDTH_STEP[precision], DTYPES[precision]
    ends_E = torch.tensor([3, 8], dtype=torch.int32)
    for width in range(2, 34, 2):
        x_PD, w_EHD = torch.ones(8, width, dtype=dtype), torch.ones(2, 16, width, dtype=dtype)
        taken = True
        try:
            torch._grouped_mm(x_PD, w_EHD.transpose(1, 2), offs=ends_E)
        except RuntimeError as error:
            assert "multiple of 16 bytes" in str(error)
            taken = False
        assert taken == (width % step == 0)


def test_a_width_that_does_not_fit_names_the_next_one(tmp_path):
    for overrides, sentence in (
        ({"model__width": 100, "model__heads": 2}, "model.width=100 is not a multiple of 8, .* in bf16; use 104"),
        ({"model__width": 102, "model__heads": 3}, "model.width=102 .*; use 120"),
        ({"moe__expert_hidden": 129}, "moe.expert_hidden=129 is not a multiple of 8, .*; use 136"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            resolved(tmp_path, {}, **overrides)
        resolved(tmp_path, {}, gpu=False, **overrides)
    resolved(tmp_path, {"bf16": {"enabled": False}}, model__width=100, model__heads=2)
    with pytest.raises(ConfigError, match="model.width=102 is not a multiple of 4, .* in fp32; use 104"):
        resolved(tmp_path, {"bf16": {"enabled": False}}, model__width=102, model__heads=1)
    resolved(tmp_path, {}, model__width=100, model__heads=2, moe__router="dense")


def test_more_local_experts_than_a_grouped_product_takes_are_refused():
    run = load_config("tiny", None, {"moe.num_experts": 2048}).config
    with pytest.raises(ConfigError, match="2048 over expert-parallel size 2 leaves 1024 experts per GPU"):
        check_widths(run, "bf16", 2)
    check_widths(run, "bf16", 4)


def test_plans_and_dry_runs_for_gpus_check_widths_too(monkeypatch, capsys):
    assert plan.main(plan.build_parser("").parse_args(["--set", "model.width=100", "--set", "model.heads=2"])) == 2
    assert "use 104" in capsys.readouterr().err
    arguments = ["--ds_config", "ds_configs/zero2.json", "--dry_run", "--world_size", "2"]
    arguments += ["--set", "model.width=100", "--set", "model.heads=2"]
    monkeypatch.delenv("DS_ACCELERATOR")
    assert dry_run.main(pretrain_parser("").parse_args(arguments)) == 2
    assert "use 104" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("heads", "precision", "hint"),
    [
        (2, "bf16", None),
        (4, "bf16", None),
        (2, "fp32", None),
        (64, "fp32", "heads of width 2 in fp32"),
        (64, "fp16", None),
    ],
)
def test_only_heads_that_no_fused_kernel_takes_get_a_hint(heads, precision, hint):
    run = load_config("tiny", None, {"model.heads": heads}).config
    found = attention_hint(run, precision)
    assert found is None if hint is None else hint in found
    wide = load_config("tiny", None, {"model.head_width": 260}).config
    assert "heads of width 260 in bf16" in attention_hint(wide, "bf16")


# ---------------------------------------------------------------- precision and optimizer


@pytest.mark.parametrize(
    ("values", "precision", "sums"),
    [
        ({}, "bf16", None),
        ({"zero_optimization": {"stage": 1}}, "bf16", None),
        ({"zero_optimization": {"stage": 2}}, "bf16", "fp32"),
        ({"zero_optimization": {"stage": 3}}, "bf16", "fp32"),
        ({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}, "bf16", "bf16"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "bf16", None),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16", None),
        ({"bf16": {"enabled": False}}, "fp32", None),
        ({"fp16": {"enabled": True}}, "fp16", None),
        ({"bfloat16": {"enabled": False}}, "fp32", None),
    ],
)
def test_a_gpu_computes_in_bf16_unless_told_otherwise(tmp_path, values, precision, sums):
    config = resolved(tmp_path, values)
    assert config.precision == precision
    assert config.deepspeed.get("data_types", {}).get("grad_accum_dtype") == sums
    if not values.keys() & {"bf16", "fp16", "bfloat16"}:
        assert resolved(tmp_path, values, gpu=False).precision == "fp32"


@pytest.mark.parametrize(
    ("params", "gpu", "fused"),
    [
        ({"torch_adam": True}, True, True),
        ({"torch_adam": True}, False, True),
        ({"torch_adam": True, "fused": False}, True, False),
        ({"torch_adam": True, "foreach": True}, True, None),
        ({}, True, True),  # PyTorch's, for DeepSpeed's would be compiled
        ({"torch_adam": False}, True, None),
        ({"bias_correction": True}, True, None),  # which only DeepSpeed's has
    ],
)
def test_adam_is_fused_unless_the_json_says_otherwise(tmp_path, params, gpu, fused):
    config = resolved(tmp_path, {"optimizer": {"type": "AdamW", "params": params}}, gpu)
    assert config.deepspeed["optimizer"]["params"].get("fused") is fused


def test_an_optimizer_on_the_host_is_left_alone(tmp_path):
    config = resolved(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert "fused" not in config.deepspeed["optimizer"]["params"]


def test_autocast_is_refused_with_its_remedy(tmp_path):
    with pytest.raises(ConfigError, match='torch_autocast is not supported here .*write "bf16": {"enabled": true}'):
        resolved(tmp_path, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, gpu=False)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_fills_a_json_that_says_nothing_of_it_and_contradicts_no_other(precision, gpu, tmp_path):
    loaded = load_config("tiny", None, {"train.precision": precision})
    path = tmp_path / "ds.json"
    path.write_text("{}")
    assert resolve(str(path), loaded, 1, gpu=gpu).precision == precision
    for text, there in (
        ('{"bf16": {"enabled": true}}', "bf16"),
        ('{"bfloat16": {"enabled": true}}', "bf16"),
        ('{"fp16": {"enabled": true}}', "fp16"),
        ('{"bf16": {"enabled": false}}', "fp32"),
    ):
        path.write_text(text)
        if there == precision:
            assert resolve(str(path), loaded, 1, gpu=gpu).precision == precision
        else:
            with pytest.raises(ConfigError, match=f"train.precision={precision} .*contradicts {there} in DeepSpeed"):
                resolve(str(path), loaded, 1, gpu=gpu)
        auto = load_config("tiny").config.train.precision
        assert auto == "auto" and resolve(str(path), load_config("tiny"), 1, gpu=gpu).precision == there

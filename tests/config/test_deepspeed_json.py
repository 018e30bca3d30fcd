"""The DeepSpeed JSON and the run configuration: "auto" is filled, contradictions are refused."""

import json
import re
from pathlib import Path

import pytest

from vqmoe_ds.config.deepspeed_json import TOP_LEVEL_KEYS, resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.runtime.errors import ConfigError

TWO_PASSES = {"optimizer": {"params": {"torch_adam": True, "fused": True, "foreach": True}}}
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def write(tmp_path, **values):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_file_loads_into_deepspeeds_own_config(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    ep = re.search(r"ep(\d+)", path.stem)
    world = int(ep[1]) if ep else 1
    preset = "base-64e" if ep else "tiny"
    config = resolve(str(path), load_config(preset, None, {"train.batch_size": 512}), world)
    values = {**config.deepspeed, "train_batch_size": 512 // world, "gradient_accumulation_steps": 1}
    values["train_micro_batch_size_per_gpu"] = 512 // world
    parsed = DeepSpeedConfig(values)  # of one rank: no process group here
    assert parsed.zero_optimization_stage == config.zero_stage
    assert config.ep_size == world


def test_shipped_files_cover_the_stages():
    cluster = {f"zero{stage}-ep{size}.json" for stage in (2, 3) for size in (8, 64)}
    assert {f"zero{s}.json" for s in range(4)} | {"zero2-offload.json"} | cluster <= {p.name for p in SHIPPED}


def test_auto_means_as_in_the_run_configuration(tmp_path):
    path = write(tmp_path, optimizer={"type": "AdamW", "params": {"lr": "auto"}}, gradient_clipping="auto")
    config = resolve(path, load_config("tiny", None, {"train.learning_rate": 0.5, "train.grad_clip": 2.0}), 1)
    assert config.deepspeed["optimizer"]["params"]["lr"] == 0.5
    assert config.deepspeed["gradient_clipping"] == 2.0


def test_a_number_in_the_json_wins_over_the_preset_but_not_over_the_user(tmp_path):
    path = write(tmp_path, optimizer={"type": "AdamW", "params": {"lr": 0.25, "betas": [0.8, 0.9]}})
    run = resolve(path, load_config("tiny"), 1).run.train
    assert (run.learning_rate, run.beta1, run.beta2) == (0.25, 0.8, 0.9)
    with pytest.raises(ConfigError, match=r"train\.learning_rate=0\.5 contradicts lr=0\.25"):
        resolve(path, load_config("tiny", None, {"train.learning_rate": 0.5}), 1)


@pytest.mark.parametrize(
    ("values", "world", "expected"),
    [
        ({}, 4, (4, 1)),  # train.batch_size 16 over 4 ranks
        ({"train_batch_size": 32}, 2, (16, 1)),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, 2, (4, 4)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 4}, 2, (4, 4)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 2, (2, 3)),
        ({"train_micro_batch_size_per_gpu": 2}, 2, (2, 4)),
    ],
)
def test_batch_sizes(tmp_path, values, world, expected):
    loaded = load_config("tiny", None, {"run.run_dir": "x"})
    config = resolve(write(tmp_path, **values), _with_batch_16(loaded), world)
    assert (config.micro_batch, config.accumulation_steps) == expected
    assert config.run.train.batch_size == expected[0] * expected[1] * world == config.deepspeed["train_batch_size"]


def _with_batch_16(loaded):
    from dataclasses import replace

    train = loaded.config.train.model_copy(update={"batch_size": 16})
    return replace(loaded, config=loaded.config.model_copy(update={"train": train}))


@pytest.mark.parametrize(
    ("values", "overrides", "world", "ep", "sentence"),
    [
        ({"zer_optimization": {}}, {}, 1, None, "did you mean zero_optimization?"),
        ({"pipeline": {}}, {}, 1, None, "pipeline parallelism"),
        ({"checkpoint": {"writer": {"decoupled": True}}}, {}, 1, None, "checkpoint.writer"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, {}, 1, None, "batch sizes contradict"),
        ({"train_batch_size": 3}, {}, 2, None, "batch sizes contradict"),
        ({"train_batch_size": 8}, {"train.batch_size": 16}, 1, None, "contradicts train_batch_size=8"),
        ({"expert_parallel": {"autoep_size": 3}}, {}, 4, None, "does not divide the 4 ranks"),
        ({"expert_parallel": {"autoep_size": 4}}, {"moe.num_experts": 6, "moe.top_k": 1}, 4, None, "moe.num_experts=6"),
        ({"expert_parallel": {"autoep_size": 2}}, {}, 4, 4, "give it once"),
        ({"expert_parallel": {"preset_model": "x"}}, {}, 1, None, "expert_parallel.preset_model"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, {}, 1, None, "reduce_bucket_size"),
        ({"zero_optimization": {"elastic_checkpoint": True}}, {}, 1, None, "elastic_checkpoint is not supported"),
    ],
)
def test_contradictions_get_one_sentence(tmp_path, values, overrides, world, ep, sentence):
    with pytest.raises(ConfigError) as caught:
        resolve(write(tmp_path, **values), load_config("tiny", None, overrides), world, ep)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"bf16": True}, "bf16 must be a JSON object, not True"),
        ({"bf16": None}, "bf16 must be a JSON object, not None"),
        ({"bfloat16": True}, "bfloat16 must be a JSON object"),
        ({"fp16": False}, "fp16 must be a JSON object"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled must be true or false, not 'yes'"),
        ({"zero_optimization": 3}, "zero_optimization must be a JSON object, not 3"),
        ({"zero_optimization": None}, "zero_optimization must be a JSON object, not None"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage must be 0, 1, 2 or 3, not 'two'"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be 0, 1, 2 or 3, not True"),
        ({"data_types": None}, "data_types must be a JSON object"),
        ({"data_types": {"grad_accum_dtype": 32}}, "data_types.grad_accum_dtype must be text, not 32"),
        ({"optimizer": None}, "optimizer must be a JSON object"),
        ({"optimizer": "AdamW"}, "optimizer must be a JSON object, not 'AdamW'"),
        ({"optimizer": {"type": "AdamW", "params": None}}, "optimizer.params must be a JSON object, not None"),
        ({"optimizer": {"params": {"betas": [0.9]}}}, "optimizer.params.betas must be a list of two numbers"),
        ({"optimizer": {"params": {"lr": "low"}}}, "optimizer.params.lr must be a number or \"auto\", not 'low'"),
        (TWO_PASSES, "optimizer.params has both fused and foreach"),
        ({"optimizer": {"params": {"differentiable": True}}}, "optimizer.params.differentiable is for gradients"),
        ({"optimizer": {"params": {"lr": -1}}}, "train.learning_rate=-1: input should be greater than 0"),
        ({"train_batch_size": "many"}, "train_batch_size must be a whole number of 1 to 2^30, or \"auto\", not 'many'"),
        ({"expert_parallel": {"autoep_size": "2"}}, "expert_parallel.autoep_size must be a whole number, not '2'"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"bfloat16": {"enabled": True}, "fp16": {"enabled": True}}, "bfloat16 and fp16 are both enabled"),
        ({"bfloat16": {"enabled": True}, "bf16": {"enabled": False}}, "bfloat16 is another name of bf16"),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "data_types.grad_accum_dtype must be fp32, bf16 or fp16"),
        ({"optimizer": {"lr": 0.1}}, "optimizer.lr is not read; what optimizer takes stands in optimizer.params"),
        ({"optimizer": {"type": "Adam", "betas": [0, 0]}}, "optimizer.betas is not read"),
        ({"scheduler": {"type": "WarmupLR", "warmup_num_steps": 3}}, "scheduler.warmup_num_steps is not read"),
        ({"scheduler": {}}, "scheduler has no type, and would do nothing"),
        (
            {"scheduler": {"type": "WarmupCosine"}, "zero_optimization": {"stage": 1}},
            "scheduler.type WarmupCosine is none of those that DeepSpeed has for ZeRO 1; did you mean WarmupCosineLR?",
        ),
        (
            {"scheduler": {"type": "StepLR"}, "zero_optimization": {"stage": 3}},
            "scheduler.type StepLR is none of those that DeepSpeed has for ZeRO 3; ",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device is nvme, and nothing says where; set nvme_path",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_values_of_another_kind_get_one_sentence(tmp_path, values, sentence):
    for gpu in (False, True):
        with pytest.raises(ConfigError) as caught:
            resolve(write(tmp_path, **values), load_config(), 1, gpu=gpu)
        assert f": {sentence}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_null_leaves_the_optimizer_on_the_device_and_one_precision_may_be_off(tmp_path):
    zero = {"stage": 2, "offload_optimizer": None}
    path = write(tmp_path, zero_optimization=zero, bf16={"enabled": False}, fp16={"enabled": True})
    assert resolve(path, load_config(), 1, gpu=True).precision == "fp16"


def test_a_scheduler_without_options_gets_an_empty_section(tmp_path):
    path = write(tmp_path, scheduler={"type": "WarmupLR"})
    assert resolve(path, load_config(), 1).deepspeed["scheduler"] == {"type": "WarmupLR", "params": {}}
    stage0 = write(tmp_path, scheduler={"type": "StepLR", "params": {"step_size": 3}}, zero_optimization={"stage": 0})
    assert resolve(stage0, load_config(), 1).zero_stage == 0, "there PyTorch's work"


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(str(tmp_path / "none.json"), load_config(), 1)
    (tmp_path / "bad.json").write_text("{,}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        resolve(str(tmp_path / "bad.json"), load_config(), 1)


def test_expert_parallel_ranks_follow_deepspeeds_topology(tmp_path):
    path = write(tmp_path, expert_parallel={"autoep_size": 2})
    config = resolve(path, load_config(), 4)
    assert [config.ep_rank(r) for r in range(4)] == [0, 1, 0, 1]
    path = write(tmp_path, expert_parallel={"autoep_size": 2}, use_data_before_expert_parallelism=True)
    config = resolve(path, load_config(), 4)
    assert [config.ep_rank(r) for r in range(4)] == [0, 0, 1, 1]


def test_known_keys_are_those_deepspeed_reads():
    """Each key we let through is read somewhere in DeepSpeed's configuration."""
    import deepspeed

    root = Path(deepspeed.__file__).parent
    text = "".join(
        p.read_text(errors="ignore") for p in root.rglob("*.py") if "config" in p.name or "constants" in p.name
    )
    unread = [key for key in TOP_LEVEL_KEYS if f'"{key}"' not in text and f"'{key}'" not in text]
    assert not unread

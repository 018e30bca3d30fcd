"""One rank of a large job, built on this machine: presets, groups, experts and sentences."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from vqmoe_ds.config.cli import build_parser
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer
from vqmoe_ds.planning import dry_run, memory
from vqmoe_ds.planning.parameters import count, meta_model
from vqmoe_ds.planning.speed import members
from vqmoe_ds.planning.traffic import Over

JSONS = ["zero2-ep8", "zero2-ep64", "zero3-ep8", "zero3-ep64"]
CLUSTER = {"64e": 64, "128e": 128, "256e": 256}


def job(name: str, preset: str, world: int) -> EngineConfig:
    return resolve(f"ds_configs/{name}.json", load_config(preset), world)


@pytest.mark.parametrize(("preset", "world", "name"), [
    ("64e", 64, "zero2-ep8"), ("64e", 512, "zero3-ep64"), ("128e", 128, "zero2-ep64"), ("256e", 512, "zero3-ep8"),
])  # fmt: skip
def test_cluster_presets_are_dry_run(preset, world, name):
    check(preset, world, name)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "world", "name"), product(CLUSTER, (64, 128, 256, 512), JSONS))
def test_every_cluster_preset_with_every_file(preset, world, name):
    check(preset, world, name)


def check(preset: str, world: int, name: str) -> None:
    """A rank in the middle holds its experts, in groups as the planner numbers them."""
    config, rank = job(name, preset, world), world // 2 + 5
    report = dry_run.dry_run(config, rank, 8, name)
    experts, ep = config.run.moe.num_experts, config.ep_size
    each = experts // ep
    assert report.expert_ids == list(range(rank % ep * each, (rank % ep + 1) * each))
    assert report.expert_parallel_group == members(config, Over.EP, rank) == [rank // ep * ep + i for i in range(ep)]
    assert report.expert_data_parallel_group == members(config, Over.EDP, rank) == list(range(rank % ep, world, ep))
    assert report.all_to_all_within_node == (ep <= 8)
    assert report.parameters["dense"] + report.parameters["experts"] * ep == report.parameters["stored"]
    assert report.bytes["device"] < 40e9
    assert report.loss_shape == []


@pytest.mark.parametrize(("preset", "stored"), [("64e", 1e9), ("128e", 7e9), ("256e", 30e9)])
def test_sizes_are_those_the_names_promise(preset, stored):
    run = load_config(preset).config
    assert run.moe.num_experts == CLUSTER[preset]
    assert count(run).stored == pytest.approx(stored, rel=0.05)


def test_data_before_experts_puts_the_all_to_all_across_nodes(tmp_path):
    """E + D, the default, fills nodes with expert-parallel groups; the other order is worse and the planner sees it."""
    config = job("zero2-ep8", "64e", 64)
    values = json.loads(Path("ds_configs/zero2-ep8.json").read_text())
    (tmp_path / "d.json").write_text(json.dumps({**values, "use_data_before_expert_parallelism": True}))
    other = resolve(str(tmp_path / "d.json"), load_config("64e"), 64)
    here, there = (dry_run.dry_run(c, 9, 8, "") for c in (config, other))
    assert here.expert_parallel_group == list(range(8, 16))
    assert here.all_to_all_within_node
    assert there.expert_parallel_group == members(other, Over.EP, 9) == list(range(1, 64, 8))
    assert there.expert_data_parallel_group == members(other, Over.EDP, 9) == list(range(8, 16))
    assert not there.all_to_all_within_node
    assert there.expert_ids == list(range(8, 16))


def test_ranks_share_sequences_within_a_node():
    shared = load_config("64e", None, {"train.sequence_parallel_size": 4})
    config = resolve("ds_configs/zero2-ep8.json", shared, 64)
    report, whole = dry_run.dry_run(config, 9, 8, ""), dry_run.dry_run(job("zero2-ep8", "64e", 64), 9, 8, "")
    assert report.sequence_parallel_group == members(config, Over.SP, 9) == [8, 9, 10, 11]
    assert report.expert_parallel_group == whole.expert_parallel_group == list(range(8, 16))
    assert "ranks that share its sequences: 8..11" in dry_run.text(report)
    assert whole.sequence_parallel_group == [9] and "its sequences" not in dry_run.text(whole)
    assert report.accumulation_steps == 4 * whole.accumulation_steps
    assert whole.bytes["activations"] / 4 < report.bytes["activations"] < whole.bytes["activations"] / 3


def test_planned_groups_are_those_of_deepspeed():
    config = job("zero2-ep8", "256e", 64)
    model = meta_model(config.run, config.ep_size, 0, DeepSpeedMoELayer)
    with dry_run.fake_ranks(0, 64):
        dry_run._bind_groups(model, config, 0)
        real = dry_run._optimizer_groups(model, config)
    assert [sum(g.sizes) for g in memory.optimizer_groups(count(config.run), config)] == real
    assert len(real) > 3, "large enough that experts are split into several groups"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--dry_run needs --world_size"),
        (["--world_size", "64", "--rank", "64"], "--rank 64 is not one of the 64 ranks 0 to 63"),
        (["--world_size", "12", "--set", "train.batch_size=24"], "expert-parallel size 8 does not divide the 12 ranks"),
        (["--world_size", "64", "--set", "moe.num_experts=12"], "size 8 does not divide moe.num_experts=12"),
        (["--world_size", "64", "--gpus_per_node", "0"], "--gpus_per_node 0 must be at least 1"),
        (["--world_size", "3072", "--preset", "64e"], "batch sizes contradict"),
    ],
)
def test_bad_input_is_one_sentence(capsys, options: list[str], sentence: str):
    preset = [] if "--preset" in options else ["--preset", "64e"]
    assert run_main(["--ds_config", "ds_configs/zero2-ep8.json", *preset, *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_report_is_printed_for_people_and_as_json(capsys):
    command = ["--ds_config", "ds_configs/zero2.json", "--world_size", "4", "--rank", "3", "--ep_size", "2"]
    assert run_main(command) == 0
    assert "rank 3 of 4 (node 0): ZeRO-2, EP 2, fp32" in capsys.readouterr().out
    assert run_main([*command, "--json", "--set", "codebook.birth_step=1"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["expert_ids"] == list(range(8, 16))
    assert "codebook.birth_step is deprecated" in printed.err


def run_main(command: list[str]) -> Any:
    return dry_run.main(build_parser("").parse_args([*command, "--dry_run"]))

"""The planning command: figures that can be checked by hand, rankings that must come out, and its sentences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.load import load_config
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.planning import layouts, memory, speed, traffic
from vqmoe_ds.planning.command import build_parser, main
from vqmoe_ds.planning.hardware import MOST_RANKS, PROCESSORS, Cluster
from vqmoe_ds.planning.layouts import Choices, explore
from vqmoe_ds.planning.parameters import count
from vqmoe_ds.planning.traffic import Over, Transfer
from vqmoe_ds.runtime.errors import ConfigError

H100 = PROCESSORS["h100"]


def plan(capsys, *options: str) -> tuple[int, str, str]:
    code = main(build_parser("").parse_args(list(options)))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def engine(world: int = 16, ep: int = 4, stage: int = 2, micro: int = 1, **changes) -> EngineConfig:
    run = load_config("base", None, {"train.batch_size": world * micro, **changes}).config
    return EngineConfig({"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}, run, ep, world, micro, 1)


def test_parameters_are_those_of_the_real_model():
    run = load_config("tiny").config
    counted, real = count(run), MoETransformer(run)
    assert {w.name: w.shape for w in counted.weights} == {n: tuple(p.shape) for n, p in real.named_parameters()}
    assert counted.stored == sum(p.numel() for p in real.parameters())
    assert counted.buffer_bytes == sum(b.nbytes for b in real.buffers())


def test_activations_grow_with_the_batch_and_shrink_when_recomputed():
    one, two = (memory.activations(engine(micro=micro), 1.0) for micro in (1, 2))
    assert two == 2 * one
    recomputed = memory.activations(engine(**{"train.activation_checkpointing": True}), 1.0)
    assert recomputed < 0.6 * one
    assert memory.activations(engine(), 1.5) > one


def test_a_plan_of_shared_sequences_counts_their_exchange_and_refuses_what_does_not_divide(capsys):
    shared = ("--preset", "64e", "--nodes", "1", "--gpu", "h100", "--set", "train.sequence_parallel_size=4")
    code, out, _ = plan(capsys, *shared)
    assert code == 0 and "SP 4, ZeRO-" in out
    assert "heads and positions" in out and "sequence-parallel group" in out
    code, _, error = plan(capsys, *shared, "--set", "model.heads=6")
    assert code == 2 and "sequence-parallel size 4 does not divide model.heads=6" in error


def test_higher_stages_hold_less():
    parameters = count(engine().run)
    held = [sum(memory.states(parameters, engine(stage=stage), 0)) for stage in (1, 2, 3)]
    assert held[0] >= held[1] > held[2]


def test_offload_moves_the_optimizer_to_the_host():
    config = engine()
    config = replace(config, deepspeed={**config.deepspeed, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})  # fmt: skip  # noqa: E501
    need = memory.estimate(count(config.run), config)
    assert need.optimizer == need.gradients == 0
    assert need.host > 0


def test_bytes_on_links_by_hand():
    config = engine(world=16, ep=8)
    rows = Transfer("expert rows", "all_to_all", Over.EP, 800, 1)
    assert speed.sent(rows, config, per_node=8) == speed.LinkBytes(700, 0)
    assert speed.sent(rows, config, per_node=4) == speed.LinkBytes(300, 400)
    reduced = Transfer("gradients", "all_reduce", Over.EDP, 800, 1)
    assert speed.sent(reduced, config, per_node=8) == speed.LinkBytes(0, 800)
    assert speed.sent(reduced, config, per_node=16) == speed.LinkBytes(800, 0)


def test_a_slow_network_keeps_experts_on_the_node():
    """What the all-to-all needs grows with EP, what gradients need falls: the best EP size follows from the links."""
    run = load_config("64e").config
    slow = explore(run, Cluster(8, 8, H100, network_gbps=3), Choices(stages=[2]), {})
    assert slow[0].config.ep_size == 8
    flat = explore(run, Cluster(8, 8, replace(H100, link_gbps=1), network_gbps=400), Choices(stages=[2]), {})
    assert flat[0].config.ep_size == 1


def test_ranking_is_by_time_among_those_that_fit():
    plans = explore(load_config("128e").config, Cluster(4, 8, PROCESSORS["a100-40"], 25), Choices(), {})
    fits = [p.fits for p in plans]
    assert any(fits) and not all(fits), "this cluster is just large enough"
    assert fits == sorted(fits, reverse=True)
    times = [p.speed.step_seconds for p in plans if p.fits]
    assert times == sorted(times)


def test_layouts_with_more_local_experts_than_gpus_take_are_left_out():
    changes = {"moe.num_experts": 2048, "moe.expert_hidden": 8, "train.batch_size": 64}
    run = load_config("tiny", None, changes).config
    plans = explore(run, Cluster(1, 8, H100), Choices(), {})
    assert {p.config.ep_size for p in plans} == {4, 8}  # 2,048 and 1,024 experts a GPU at 1 and 2
    assert {p.config.ep_size for p in explore(run, Cluster(1, 8, H100), Choices(on_gpu=False), {})} == {1, 2, 4, 8}
    with pytest.raises(ConfigError, match="leaves more than 1023 experts a GPU .*--nodes"):
        explore(run, Cluster(1, 8, H100), Choices(ep_sizes=[2]), {})


def test_recomputation_repeats_no_all_to_all():
    rows = [
        next(t for t in traffic.transfers(count(c.run), c) if t.purpose == "expert rows").payload
        for c in (engine(), engine(**{"train.activation_checkpointing": True}))
    ]
    assert rows[1] == rows[0]


def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys):
    files = ["--json", str(tmp_path / "plan.json"), "--figure", str(tmp_path / "plan.png")]
    code, out, _ = plan(capsys, "--preset", "64e", "--nodes", "2", "--ds_config", "ds_configs/zero2-ep8.json", *files)
    assert code == 0
    assert "983,470,872 parameters stored, 105,812,760 used by a token" in out
    assert "What the times assume" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["layouts"][0]["fits"]
    assert (
        sum(v for k, v in written["layouts"][0]["bytes"].items() if k not in ("host", "device"))
        == (written["layouts"][0]["bytes"]["device"])
    )
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_every_remedy_does_it(capsys):
    """The sentence names what was tried and fits: following any part of it succeeds."""
    options = ["--preset", "256e", "--gpu", "l40s", "--network_gbps", "25"]
    _, _, error = plan(capsys, *options)
    memory_gb, offload, nodes = error.split("what would do: ")[1].strip().split(", or ")
    assert plan(capsys, *options, "--gpu_memory", memory_gb.split()[2])[0] == 0
    assert plan(capsys, *options, offload)[0] == 0
    assert plan(capsys, *options, *nodes.split())[0] == 0


def test_remedies_take_no_more_ranks_than_a_plan_does(monkeypatch):
    tried = []

    def explore(run, cluster, choices, base):
        tried.append(cluster.ranks)
        return [SimpleNamespace(memory=SimpleNamespace(device=10**15), fits=False)]

    monkeypatch.setattr(layouts, "explore", explore)
    run = load_config("tiny", None, {"train.batch_size": 2**30}).config
    layouts.remedies(run, Cluster(1, 8, H100), Choices(), {})
    assert max(tried) == MOST_RANKS


def test_the_precision_is_that_of_the_plan_and_shared_numbers_are_those_of_the_json(tmp_path, capsys):
    path, files = tmp_path / "x.json", ("--ds_config", str(tmp_path / "x.json"), "--json", "-")
    path.write_text('{"fp16": {"enabled": true}, "sequence_parallel_size": 2, "train_batch_size": 16}')
    run = load_config("tiny", None, {"train.sequence_parallel_size": 2, "train.batch_size": 16}).config
    for precision in ("fp32", "bf16"):
        code, out, _ = plan(capsys, *files, "--precision", precision)
        assert code == 0
        expected = explore(run, Cluster(1, 8, H100), Choices(precision=precision), {})
        found = json.loads(out)["layouts"]
        assert [p["name"] for p in found] == [p.name for p in expected]
        assert [p["bytes"]["weights"] for p in found] == [p.memory.weights for p in expected]
        assert all(p["layout"]["precision"] == precision for p in found)
    code, _, error = plan(capsys, *files, "--set", "train.batch_size=32")
    assert code == 2 and "train.batch_size=32 contradicts train_batch_size=16" in error
    # A total that is given as a product: 4 groups of 2 ranks read 4 sequences each.
    path.write_text(
        '{"sequence_parallel_size": 2, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}'
    )
    code, out, _ = plan(capsys, *files)
    layout = json.loads(out)["layouts"][0]["layout"]
    assert code == 0 and layout["micro_batch"] * layout["accumulation_steps"] * 4 == 16


AT_EXPERTS = ["--preset", "64e", "--set", "model.heads=16", "--set", "train.sequence_parallel_size=8",
              "--set", "codebook.groups=8", "--set", "moe.router=vq", "--set", "moe.top_k=0",
              "--set", "train.sp_placement=expert"]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpu", "h10"], "--gpu h10 is not in the catalogue; did you mean h100?"),
        (["--preset", "64e", "--ep_size", "5"], "--ep_size 5 does not divide the 8 ranks"),
        (["--preset", "64e", "--ep_size", "0"], "--ep_size 0 does not divide the 8 ranks"),
        (["--preset", "base", "--nodes", "3"], "train.batch_size=44 is not a multiple of the 24 ranks"),
        (["--preset", "64e", "--nodes", "16", "--ep_size", "128"], "--ep_size 128 does not divide moe.num_experts=64"),
        (["--preset", "64e", "--micro_batch", "3"], "--micro_batch 3 does not divide the 128 sequences"),
        (["--preset", "64e", "--gpu_memory", "-1"], "--gpu_memory -1 must be more than 0"),
        (["--nodes", "1000000000"], "--nodes 1e+07 must be more than 0 and less than"),
        (["--nodes", "99999"], "are 799,992 ranks, and a plan takes 262,144"),
        (["--network_gbps", "nan"], "--network_gbps nan must be more than 0"),
        (["--latency_us", "inf"], "--latency_us inf must be"),
        (["--set", "model.layers=1000000000"], "model.layers=1000000000: input should be less than"),
        ([*AT_EXPERTS, "--set", "codebook.groups=1"], "set codebook.groups to a multiple of --ep_size 8"),
        ([*AT_EXPERTS, "--set", "moe.router=topk", "--set", "moe.top_k=1"], "that codes name: set moe.router=vq"),
        ([*AT_EXPERTS, "--set", "train.sequence_parallel_size=1"], "there are --sp_size 1 and --ep_size 1"),
        (["--json", "/"], "--json / is a folder; name a file in a folder that exists"),
        (["--figure", "no/such/folder.png"], "--figure no/such/folder.png lies in no folder that exists"),
        (["--preset", "64e", "--imbalance", "0.5"], "--imbalance 0.5 must be at least 1"),
        (["--preset", "256e", "--gpu", "l40s"], "no layout fits 48 GB a processor; the least is ZeRO-2, EP 8"),
    ],
)
def test_what_cannot_be_is_one_sentence(capsys, options, sentence):
    code, _, error = plan(capsys, *options)
    assert code == 2
    assert sentence in error
    assert error.count("\n") == 1

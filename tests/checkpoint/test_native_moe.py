"""Checkpoints of native ``deepspeed.moe.layer.MoE`` models: read, exported and moved to other layouts; real engines."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from tests.distributed import run_ranks
from vqmoe_ds.checkpoint.convert import build_parser, main
from vqmoe_ds.checkpoint.formats.deepspeed.zero import LARGEST_GROUP
from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
from vqmoe_ds.checkpoint.formats.native_moe.names import expand, match_names, merge_split, numbered
from vqmoe_ds.checkpoint.formats.native_moe.reader import NativeReader, open_native
from vqmoe_ds.checkpoint.formats.native_moe.writer import native_layout, write_native
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.inspect import build_parser as inspect_parser
from vqmoe_ds.checkpoint.inspect import inspect
from vqmoe_ds.checkpoint.inspect import main as inspect_main
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.reader import KINDS, CheckpointReader
from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig
from vqmoe_ds.moe.deepspeed_gate import VQGate, vq_gates
from vqmoe_ds.moe.state_sync import StateSync
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import new_folder

WIDTH, EXPERTS, VOCAB, BATCH, SAVED_AT, STEPS = 8, 4, 24, 8, 3, 3
BOOK = CodebookConfig(source=CodeSource.LAYER_STATE, kmeans_samples=64, num_codes=6)


@dataclass(frozen=True)
class Native:
    """A layout, and what the model has beyond the plain one: ``g`` two optimizer groups, ``t`` tied weights, ``f`` a
    frozen one, ``v`` codes in place of gates, ``d`` data before expert parallelism, ``o`` optimizer on the CPU."""

    stage: int
    ep: int
    world: int
    precision: str = "fp32"
    extra: str = ""

    def __str__(self) -> str:
        return f"zero{self.stage}-ep{self.ep}-world{self.world}-{self.precision}{self.extra}"


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.register_buffer("scale", torch.full((), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) * self.scale


class Model(nn.Module):
    """Next symbol through two native layers, the second a residual one."""

    def __init__(self, layout: Native) -> None:
        super().__init__()
        extra = layout.extra
        self.embed = nn.Embedding(VOCAB, WIDTH)
        more = {"k": 1, "drop_tokens": False, "use_rts": False}
        self.layers = nn.ModuleList(
            MoE(WIDTH, Expert(), EXPERTS, layout.ep, use_residual=index == 1, **more) for index in range(2)
        )
        if "v" in extra:
            for index, layer in enumerate(self.layers):
                layer.deepspeed_moe.gate = VQGate(WIDTH, EXPERTS, MoEConfig(top_k=1, balance_weight=0.0), BOOK, index)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("offset", torch.linspace(0, 1, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if "t" in extra:
            self.head.weight = self.embed.weight
        if "f" in extra:
            self.norm.weight.requires_grad_(False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = self.embed(tokens_BS[:, :-1]) + self.offset.to(self.embed.weight.dtype)
        for layer in self.layers:
            x = x + layer(x)[0]
        logits = self.head(self.norm(x)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())


def draw(model: Model, ep_rank: int) -> None:
    """The same model on every layout: values follow from names with global experts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = sum(map(ord, global_name(name, ep_rank, model.layers[0].num_local_experts)))
            parameter.normal_(0, 0.4, generator=torch.Generator().manual_seed(seed))


def global_name(name: str, ep_rank: int, local: int) -> str:
    if ".deepspeed_experts." not in name:
        return name
    number = name.split(".deepspeed_experts.")[1].split(".")[0]
    return numbered(name, ep_rank * local + int(number))


def groups_of(model: Model, layout: Native) -> Any:
    if "g" not in layout.extra:
        return [p for p in model.parameters() if p.requires_grad]
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    params = list(model.parameters())
    wide, narrow = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
    return split([
        {"params": wide, "name": "wide", "weight_decay": 0.1},
        {"params": narrow, "name": "narrow", "weight_decay": 0.0},
    ])  # fmt: skip


def engine_of(layout: Native, rank: int) -> Any:
    model = Model(layout)
    replicas = layout.world // layout.ep
    ep_rank = rank // replicas if "d" in layout.extra else rank % layout.ep
    draw(model, ep_rank)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // layout.world,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True, "eps": 1e-6}},
        "zero_optimization": {"stage": layout.stage},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.01}},
    }
    if layout.stage:  # at stage 0 DeepSpeed clips wrongly with expert parallelism
        config["gradient_clipping"] = 0.7
    if layout.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if "d" in layout.extra:
        config["use_data_before_expert_parallelism"] = True
    if "o" in layout.extra:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups_of(model, layout), config=config)
    engine.ep_rank = ep_rank
    return engine


def train(engine: Any, layout: Native, rank: int, steps: range) -> list[float]:
    syncs = [StateSync(gate.bank) for gate in vq_gates(engine.module)]
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
        tokens = (start + torch.randint(1, 4, (BATCH, 1), generator=generator) * torch.arange(7)) % VOCAB
        loss = engine(tokens.chunk(layout.world)[rank])
        engine.backward(loss)
        engine.step()
        for sync in syncs:
            sync.step()
        mean = loss.detach().float().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / layout.world)
    return losses


def truth(engine: Any, layout: Native) -> dict[str, Tensor]:
    """What this rank and its group hold, gathered from the living optimizer, by ``KIND NAME`` with global experts."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer, found = engine.optimizer, {}
    if layout.stage:
        for g, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            state = optimizer.optimizer.state[flat]
            for kind, part in (("fp32", flat), *((kind, state[kind]) for kind in KINDS[1:])):
                parts = [torch.empty_like(part) for _ in range(dist.get_world_size(optimizer.real_dp_process_group[g]))]
                dist.all_gather(parts, part.detach(), group=optimizer.real_dp_process_group[g])
                found.update(_cut(torch.cat(parts), optimizer.round_robin_bit16_groups[g], names, kind))
    elif layout.precision == "fp32":
        for parameter, name in names.items():
            found[f"fp32 {name}"] = parameter.detach().clone()
            found.update({f"{kind} {name}": optimizer.state[parameter][kind].clone() for kind in KINDS[1:]})
    local = EXPERTS // layout.ep
    keys = {key: key.split(" ") for key in found}
    return {f"{keys[key][0]} {global_name(keys[key][1], engine.ep_rank, local)}": value for key, value in found.items()}


def _cut(flat: Tensor, parameters: list[Tensor], names: dict[Tensor, str], kind: str) -> dict[str, Tensor]:
    begin, found = 0, {}
    for parameter in parameters:
        found[f"{kind} {names[parameter]}"] = flat[begin : begin + parameter.numel()].view(parameter.shape).clone()
        begin += parameter.numel()
    return found


def write(rank: int, world: int, folder: str, layouts: list[Native]) -> dict[Native, Any]:
    answers = {}
    for layout in layouts:
        engine = engine_of(layout, rank)
        train(engine, layout, rank, range(SAVED_AT))
        engine.save_checkpoint(f"{folder}/{layout}", tag="mid", client_state={"epoch": 5, "mark": torch.ones(2)})
        whole = truth(engine, layout)
        answers[layout] = train(engine, layout, rank, range(SAVED_AT, SAVED_AT + STEPS)), whole
        engine.destroy()
        deepspeed.utils.groups._EXPERT_PARALLEL_GROUP.clear()
        deepspeed.utils.groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    return answers


def resume(rank: int, world: int, folder: str, jobs: list[tuple[str, Native]]) -> list[list[float]]:
    """Losses after DeepSpeed's own ``load_checkpoint``, optimizer and scheduler included."""
    losses = []
    for name, layout in jobs:
        engine = engine_of(layout, rank)
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.add_(7)  # whatever is not loaded is seen
        path, state = engine.load_checkpoint(f"{folder}/{name}")
        assert path is not None and state["epoch"] == 5 and engine.global_steps == SAVED_AT
        losses.append(train(engine, layout, rank, range(SAVED_AT, SAVED_AT + STEPS)))
        engine.destroy()
        deepspeed.utils.groups._EXPERT_PARALLEL_GROUP.clear()
        deepspeed.utils.groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    return losses


SOURCES = {
    2: [
        *(Native(0, 2, 2), Native(2, 2, 2), Native(2, 2, 2, extra="v"), Native(2, 2, 2, extra="gft")),
        *(Native(0, 1, 2, extra="gt"), Native(1, 2, 2, extra="o"), Native(2, 2, 2, "bf16"), Native(0, 2, 2, "bf16")),
    ],
    4: [Native(1, 4, 4), Native(2, 2, 4, extra="d")],
}
ALL = [layout for some in SOURCES.values() for layout in some]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of the sources, losses that follow, and what every rank held."""
    folder = tmp_path_factory.mktemp("native")
    losses, held = {}, {}
    for world, layouts in SOURCES.items():
        answers = run_ranks(world, write, str(folder), layouts)
        for layout in layouts:
            losses[layout] = answers[0][layout][0]
            held[layout] = [answer[layout][1] for answer in answers]
    return folder, losses, held


def move(source: CheckpointReader, folder: Path, layout: Native) -> None:
    target = native_layout(source, layout.stage, layout.ep, layout.world, layout.precision)
    with new_folder(folder, True) as made:
        write_native(source, made, target)


def assert_equal(one: CheckpointReader, other: CheckpointReader) -> None:
    assert one.shapes == other.shapes and one.optimizer_step() == other.optimizer_step() and one.step == other.step
    for name in one.names():
        for kind in KINDS:
            assert torch.equal(one.tensor(name, kind), other.tensor(name, kind)), (kind, name)
    theirs = other.buffers()
    assert one.buffers().keys() == theirs.keys()
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in one.buffers().items())


# ------------------------------------------------------------------ reading


def test_whatever_needs_the_model_refuses_in_one_sentence(saved):
    reader = open_native(saved[0] / str(ALL[0]))
    with pytest.raises(CheckpointError, match="only its own code can build; tools/convert_checkpoint.py"):
        run_config(reader.config, reader.path)


@pytest.mark.parametrize("layout", ALL, ids=str)
def test_every_tensor_is_what_the_ranks_held(layout, saved):
    folder, _, held = saved
    reader = open_native(folder / str(layout))
    assert reader.layout == {
        **{"world_size": layout.world, "ep_size": layout.ep, "zero_stage": layout.stage},
        "precision": layout.precision,
    }
    numbers = {n.split("deepspeed_experts.")[1].split(".")[0] for n in reader.names() if "deepspeed_experts." in n}
    assert numbers == {str(e) for e in range(EXPERTS)}
    seen = set()
    for rank in held[layout]:
        for key, tensor in rank.items():
            kind, name = key.split(" ")
            assert torch.equal(reader.tensor(name, kind), tensor), key
            seen.add(name)
    assert not seen or seen == set(reader.names())
    assert reader.step == SAVED_AT and reader.client_state["epoch"] == 5 and reader.dropped == ["mark"]
    assert reader.counters["lr_scheduler"]["last_batch_iteration"] == SAVED_AT - 1


def test_deepspeeds_own_tools_fail_on_these(saved):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with pytest.raises(ValueError, match="is not a model state checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(str(saved[0] / str(Native(2, 2, 2))), "mid")


def test_weights_are_there_without_optimizer_files(saved, tmp_path):
    shutil.copytree(saved[0] / str(Native(2, 2, 2)) / "mid", tmp_path / "mid")
    whole = open_native(tmp_path / "mid")
    masters = {name: whole.tensor(name) for name in whole.names()}
    for path in (tmp_path / "mid").glob("*optim_states.pt"):
        path.unlink()
    reader = open_native(tmp_path / "mid")
    assert not reader.has_optimizer and reader.shapes == whole.shapes
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in masters.items())
    with pytest.raises(CheckpointError, match="weights alone"):
        native_layout(reader, ep_size=4, world_size=4)


@pytest.mark.parametrize("layout", [Native(2, 2, 2), Native(0, 2, 2, "bf16")], ids=str)
def test_inspection(layout, saved, tmp_path):
    reader = open_native(saved[0] / str(layout))
    with new_folder(tmp_path / "plain", False) as made:
        write_portable(reader, made)
    found, plain = inspect(str(saved[0] / str(layout))), inspect(str(tmp_path / "plain"), verify=True)
    assert found["model"] == plain["model"] == "a model with deepspeed.moe.layer.MoE layers"
    assert found["parameters"] == {"stored": sum(math.prod(shape) for shape in reader.shapes.values())}
    assert [row["layer"] for row in found["layers"]] == ["layers.0.deepspeed_moe", "layers.1.deepspeed_moe"]
    experts = [f"layers.1.deepspeed_moe.experts.deepspeed_experts.{e}.up.weight" for e in range(EXPERTS)]
    rms = torch.stack([reader.tensor(name).square().mean().sqrt() for name in experts])
    norms = found["layers"][1]["weight_norms"]["up.weight"]
    assert list(norms.values()) == pytest.approx([rms.min().item(), rms.mean().item(), rms.max().item()], abs=1e-5)
    assert found["layers"] == plain["layers"] and found["parameters"] == plain["parameters"]


def test_what_has_no_checksums_cannot_be_verified(saved, tmp_path, capsys):
    command = [str(saved[0] / str(Native(2, 2, 2))), str(tmp_path / "x"), "--to", "portable", "--verify"]
    assert main(build_parser("").parse_args(command)) == 2
    assert "has no checksums, being a native checkpoint; leave out --verify" in capsys.readouterr().err
    assert inspect_main(inspect_parser("").parse_args([str(saved[0] / str(Native(2, 2, 2))), "--verify"])) == 2
    assert "has no checksums, being a native checkpoint" in capsys.readouterr().err
    assert inspect_main(inspect_parser("").parse_args([str(saved[0] / str(Native(2, 2, 2)))])) == 0
    assert " parameters\n" in capsys.readouterr().out


# ------------------------------------------------------------------ moving


MOVES = {
    1: [(Native(2, 2, 2), Native(0, 1, 1)), (Native(1, 4, 4), Native(2, 1, 1))],
    2: [(Native(0, 2, 2), Native(1, 1, 2)), (Native(1, 4, 4), Native(0, 2, 2)), (Native(2, 2, 2), Native(2, 1, 2))],
    4: [(Native(0, 2, 2), Native(2, 4, 4)), (Native(2, 2, 2), Native(1, 2, 4)), (Native(2, 2, 2), Native(0, 4, 4))],
}
RICH = {
    2: [(Native(2, 2, 2, "bf16"), Native(1, 1, 2, "bf16")), (Native(0, 2, 2, "bf16"), Native(0, 1, 2, "bf16"))],
    4: [
        (Native(2, 2, 2, extra="v"), Native(1, 4, 4, extra="v")),
        (Native(2, 2, 2, extra="gft"), Native(1, 4, 4, extra="gft")),
        (Native(0, 1, 2, extra="gt"), Native(2, 2, 4, extra="gt")),
        (Native(1, 2, 2, extra="o"), Native(2, 4, 4)),
        (Native(2, 2, 4, extra="d"), Native(0, 2, 4, extra="d")),
    ],
}
"""Two groups, tied and frozen weights, codes as gates, the optimizer on the CPU, data before expert parallelism."""
EVERY = [Native(stage, ep, world) for stage in range(3) for world in (1, 2, 4) for ep in (1, 2, 4) if ep <= world]


def _move_and_check(
    folder: Path, losses: dict[Native, list[float]], moves: dict[int, list[tuple[Native, Native]]]
) -> float:
    """Move, compare tensor by tensor, resume by DeepSpeed's own load; returns the largest difference in fp32 losses."""
    worst = 0.0
    for world, pairs in moves.items():
        jobs = []
        for source, target in pairs:
            name = f"{source}-to-{target}"
            move(open_native(folder / str(source)), folder / name, target)
            assert_equal(open_native(folder / str(source)), open_native(folder / name))
            jobs.append((name, target))
        answers = run_ranks(world, resume, str(folder), jobs, timeout=1200)[0]
        for (source, target), got in zip(pairs, answers, strict=True):
            tolerance = 1e-5 if source.precision == "fp32" else 0.02
            assert got == pytest.approx(losses[source], abs=tolerance), f"{source} to {target}"
            if source.precision == "fp32":
                worst = max(worst, *(abs(a - b) for a, b in zip(got, losses[source], strict=True)))
    return worst


def test_any_layout_goes_on_in_any_other(saved):
    _move_and_check(*saved[:2], MOVES)


def test_models_with_more_in_them_go_on(saved):
    _move_and_check(*saved[:2], RICH)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_matrix(tmp_path):
    losses = {}
    for world in (1, 2, 4):
        layouts = [layout for layout in EVERY if layout.world == world]
        answers = run_ranks(world, write, str(tmp_path), layouts, timeout=600)[0]
        losses.update({layout: answer[0] for layout, answer in answers.items()})
    moves = {world: [(s, t) for s in EVERY for t in EVERY if t.world == world] for world in (1, 2, 4)}
    worst = _move_and_check(tmp_path, losses, moves)
    print(f"{sum(map(len, moves.values()))} moves, largest difference of a loss {worst:.1e}")


def test_portable_and_back(saved, tmp_path):
    folder, losses, _ = saved
    source = open_native(folder / str(Native(2, 2, 2, extra="v")))
    with new_folder(tmp_path / "portable", False) as made:
        write_portable(source, made)
    portable = open_checkpoint(tmp_path / "portable")
    assert_equal(source, portable)
    assert any("bank.codes_LKC" in name for name in portable.buffers())
    target = Native(1, 1, 2, extra="v")
    move(portable, tmp_path / "back", target)
    assert_equal(source, open_native(tmp_path / "back"))
    resumed = run_ranks(2, resume, str(tmp_path), [("back", target)])[0][0]
    assert resumed == pytest.approx(losses[Native(2, 2, 2, extra="v")], abs=1e-5)


def _load_elsewhere(rank: int, world: int, path: str) -> str:
    engine = engine_of(Native(2, 1, 2), rank)
    try:
        engine.load_checkpoint(path)
    except RuntimeError as error:
        return str(error)
    return ""


def test_what_deepspeed_refuses_to_move_moves(saved, tmp_path):
    folder = saved[0]
    source = folder / str(Native(2, 2, 2))
    assert "alignment layout" in run_ranks(2, _load_elsewhere, str(source))[0]
    reader = open_native(source)
    move(reader, tmp_path / "moved", Native(2, 1, 2))
    assert_equal(reader, open_native(tmp_path / "moved"))


def _convert(*arguments: Any) -> int:
    return main(build_parser("").parse_args([str(argument) for argument in arguments]))


def test_the_tool_moves_them(saved, tmp_path, capsys):
    source = saved[0] / str(Native(2, 2, 2))
    assert _convert(source, tmp_path / "p", "--to", "portable", "--max_shard", "2KB") == 0
    assert "left behind, as they are no plain values: mark" in capsys.readouterr().out
    layout = ["--zero", 1, "--ep", 4, "--world", 8, "--precision", "bf16"]
    assert _convert(tmp_path / "p", tmp_path / "n", "--to", "native", *layout) == 0
    assert "native DeepSpeed-MoE checkpoint for ZeRO-1, EP 4, 8 ranks, bf16" in capsys.readouterr().out
    assert_equal(open_native(source), open_checkpoint(tmp_path / "n"))
    assert _convert(source, tmp_path / "hf", "--to", "hf") == 2
    assert "not of this trainer's" in capsys.readouterr().err
    assert _convert(source, tmp_path / "x", "--to", "native", "--ep", "3", "--world", "3") == 2
    assert not (tmp_path / "x").exists() and not (tmp_path / "hf").exists()


# ------------------------------------------------------------------ refusals


@pytest.fixture
def tag(saved, tmp_path):
    shutil.copytree(saved[0] / str(Native(2, 2, 2)) / "mid", tmp_path / "tag")
    return tmp_path / "tag"


def _refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_native(path).pieces("embed.weight")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_expert_or_shard(tag):
    (tag / "layer_1_expert_2_mp_rank_00_model_states.pt").rename(tag / "kept")
    assert "layer_1_expert_2_mp_rank_00_model_states.pt is missing" in _refused(tag)
    (tag / "kept").rename(tag / "layer_1_expert_2_mp_rank_00_model_states.pt")
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing" in _refused(tag)


def test_a_scheduler_whose_state_is_not_plain_is_left_behind_and_named(tag):
    path = tag / "mp_rank_00_model_states.pt"
    model = torch.load(path, weights_only=False)
    model["lr_scheduler"]["factor"] = torch.ones(2)
    torch.save(model, path)
    reader = open_native(tag)
    assert reader.dropped == ["lr_scheduler", "mark"]
    assert "lr_scheduler" not in reader.counters and reader.counters["global_steps"] == SAVED_AT


def test_an_expert_too_many(tag):
    name = "layer_0_expert_{}_mp_rank_00_model_states.pt"
    shutil.copy(tag / name.format(3), tag / name.format(4))
    assert "but its model has 4 experts there" in _refused(tag)


def test_one_expert_in_anothers_file(tag):
    name = "layer_0_expert_{}_mp_rank_00_model_states.pt"
    shutil.copy(tag / name.format(3), tag / name.format(2))
    assert "does not hold expert 2" in _refused(tag)


def test_files_of_two_tags(saved, tag):
    other = saved[0] / str(Native(2, 2, 2, extra="gft")) / "mid"
    name = "layer_0_expert_2_mp_rank_00_model_states.pt"
    shutil.copy(tag / name, tag / "kept")
    shutil.copy(other / name, tag / name)
    assert "mixes tags: the weights of" in _refused(tag)
    (tag / "kept").rename(tag / name)
    shutil.copy(saved[0] / str(Native(1, 2, 2, extra="o")) / "mid" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", tag)
    assert "mixes tags: rank 1's optimizer" in _refused(tag)


def test_a_file_cut_short(tag):
    path = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(path, path.stat().st_size // 2)
    assert "cut short" in _refused(tag)


def test_a_hostile_expert_file(tag):
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, ("touch executed",)

    torch.save({"x": Hostile()}, tag / "layer_0_expert_1_mp_rank_00_model_states.pt")
    assert "nothing of it was executed" in _refused(tag)


def test_layouts_that_cannot_be(saved):
    reader = open_native(saved[0] / str(Native(2, 2, 2)))
    for options, sentence in (
        ({"ep_size": 3, "world_size": 3}, "--ep 3 does not divide the 4 experts of layers.0"),
        ({"ep_size": 2, "world_size": 3}, "--ep 2 does not divide --world 3"),
        ({"zero_stage": 3}, "no ZeRO stage 3 for native MoE layers"),
        ({"precision": "fp16"}, "cannot be written"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            native_layout(reader, **options)


def test_not_native(tmp_path):
    assert "no checkpoint of a model with deepspeed.moe.layer.MoE" in _refused(tmp_path)


# ------------------------------------------------------------------ names


def test_names_of_a_rank() -> None:
    a, b = "m.deepspeed_moe.experts.deepspeed_experts.", "n.deepspeed_moe.experts.deepspeed_experts."
    names = list(expand([f"{a}*.w", f"{a}*.b", f"{b}*.w"], {a: 2, b: 1}, 1))
    assert names == [
        *((f"{a}0.w", f"{a}2.w"), (f"{a}0.b", f"{a}2.b"), (f"{a}1.w", f"{a}3.w"), (f"{a}1.b", f"{a}3.b")),
        (f"{b}0.w", f"{b}1.w"),
    ]


def test_groups_that_deepspeed_cut_are_one_again() -> None:
    half = LARGEST_GROUP // 2
    rows = [
        {"options": {"lr": 1}, "moe": True, "names": ["a", "b"]},
        {"options": {"lr": 1}, "moe": True, "names": ["c"]},
        {"options": {"lr": 1}, "moe": True, "names": ["d"]},
    ]
    merged = merge_split(rows, {"a": half, "b": half, "c": half, "d": 5})
    assert [group["names"] for group in merged] == [["a", "b", "c"], ["d"]]


def test_names_follow_from_shapes_only_where_there_is_one_way() -> None:
    shapes = {"a": (2, 3), "b": (3,), "c": (2, 3)}
    assert match_names(list("abc"), shapes, [[(2, 3), (2, 3)], [(3,)]], "x") == [["a", "c"], ["b"]]
    with pytest.raises(CheckpointError, match="more than one"):
        match_names(list("abc"), shapes, [[(2, 3)], [(2, 3)], [(3,)]], "x")
    with pytest.raises(CheckpointError, match="not the model's"):
        match_names(list("abc"), shapes, [[(2, 3)]], "x")


def test_a_reader_says_how_large_it_is(saved) -> None:
    reader: NativeReader = open_native(saved[0] / str(Native(2, 2, 2)))
    assert sum(math.prod(shape) for shape in reader.shapes.values()) == sum(
        piece.length for name in reader.names() for piece in reader.pieces(name)
    )

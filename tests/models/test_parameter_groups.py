"""What decays and what does not: by name, in numbers, and in checkpoints of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.layouts import SAVED_AT, Layout, Training
from tests.checkpoint.test_restore import assert_equal_state
from tests.distributed import run_ranks
from vqmoe_ds.checkpoint.convert import build_parser, main
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.resume.session import check_structure
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.parameter_groups import parameter_groups
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer
from vqmoe_ds.planning import memory
from vqmoe_ds.planning.dry_run import _optimizer_groups
from vqmoe_ds.planning.parameters import count, meta_model
from vqmoe_ds.runtime.errors import CheckpointError

GATES = {
    "vq": ["continuous.gate.weight", "path_gate.weight"],
    "topk": ["gate.weight"],
    "xmoe": ["scores.projection_PD", "scores.experts_NP"],
    "stablemoe": ["gate.weight", "light.words_VP", "light.experts_NP"],
    "adaptive_clustering": ["gate.weight", "scores.experts_ND"],
    "expert_bias": ["gate.weight"],
}
SPARED = {"train.decay_gates": False}
LAYOUTS = [Layout(2, 2, 2), Layout(0, 2, 2), Layout(1, 1, 2)]


def _config(router: str) -> RunConfig:
    model = {"vocab_size": 30, "layers": 2, "width": 12, "heads": 2, "sequence_length": 8}
    return RunConfig(model=model, moe={"router": router, "num_experts": 4, "expert_hidden": 6, "top_k": 1})


@pytest.mark.parametrize("router", GATES)
def test_decay_spares_norms_and_biases_always_and_gates_where_told(router: str) -> None:
    for decay_gates in (True, False):
        model = MoETransformer(_config(router))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, decay_gates), lr=0.5)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        kept = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        gates = {name for name in before if ".router." in name and before[name].ndim >= 2}
        assert {name.split(".router.")[1] for name in gates} == set(GATES[router])
        vectors = {name for name, p in before.items() if p.ndim < 2}
        assert {"blocks.0.mlp_norm.weight", "norm.weight"} <= vectors
        assert kept == vectors | (set() if decay_gates else gates)
        for name, p in model.named_parameters():
            if name not in kept:
                assert torch.allclose(p, before[name] * (1 - 0.5 * 0.1)), f"{name} decays by rate times decay"


def test_the_planner_counts_the_groups_of_the_engine(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}')
    for changes in ({}, SPARED):
        config = resolve(str(tmp_path / "ds.json"), load_config("tiny", None, changes), 1)
        groups = [sum(group.sizes) for group in memory.optimizer_groups(count(config.run), config)]
        assert groups == _optimizer_groups(meta_model(config.run, layer_class=DeepSpeedMoELayer), config), changes


def _write(rank: int, world: int, folder: str) -> list[float]:
    training = Training(folder, LAYOUTS[0], rank, **SPARED)
    training.train(SAVED_AT)
    training.save(Path(folder) / "source")
    return training.train(3)


def _go_on(rank: int, world: int, folder: str) -> list[list[float]]:
    """From a tag by DeepSpeed itself, and from the source on other layouts."""
    losses = []
    for layout in LAYOUTS:
        training = Training(folder, layout, rank, **SPARED)
        training.restore(Path(folder) / "source")
        losses.append(training.train(3))
        training.close()
    training = Training(folder, LAYOUTS[1], rank, **SPARED)
    tag = open_checkpoint(Path(folder) / "moved").path
    training.session.engine.load_checkpoint(str(tag.parent), tag=tag.name)
    training.step = SAVED_AT
    return [*losses, training.train(3)]


def test_checkpoints_with_spared_gates_move_between_layouts(tmp_path: Path) -> None:
    went_on = run_ranks(2, _write, str(tmp_path))[0]
    to_portable = [str(tmp_path / "source"), str(tmp_path / "portable"), "--to", "portable", "--verify"]
    assert main(build_parser("").parse_args(to_portable)) == 0
    to_tag = [str(tmp_path / "portable"), str(tmp_path / "moved"), "--to", "deepspeed", "--zero", "0", "--ep", "2"]
    assert main(build_parser("").parse_args([*to_tag, "--world", "2"])) == 0
    assert_equal_state(open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "moved"))
    for losses in run_ranks(2, _go_on, str(tmp_path))[0]:
        assert losses == pytest.approx(went_on, abs=1e-5)


def test_a_run_with_other_groups_is_refused_and_an_older_one_is_not() -> None:
    run, spared = load_config("tiny").config, load_config("tiny", None, SPARED).config
    saved = run.model_dump(mode="json")
    with pytest.raises(CheckpointError, match="train.decay_gates=True there, False here"):
        check_structure(spared, saved, Path("tag"))
    del saved["train"]["decay_gates"]
    check_structure(run, saved, Path("tag"))

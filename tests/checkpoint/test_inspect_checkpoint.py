"""``tools/inspect_checkpoint.py``: facts, health, differences, verification."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.checkpoint.layouts import SAVED_AT, Layout, write_one, write_sources
from tests.distributed import run_ranks
from vqmoe_ds.checkpoint.convert import build_parser as convert_parser
from vqmoe_ds.checkpoint.convert import main as convert
from vqmoe_ds.checkpoint.figures import sizes
from vqmoe_ds.checkpoint.inspect import build_parser, inspect, main
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer

ONE, OTHER = Layout(2, 2, 2), Layout(3, 1, 2, "bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect")
    run_ranks(2, write_sources, str(path), [ONE, OTHER], 0)
    return path


def test_facts_and_health(folder):
    found = inspect(str(folder / str(ONE)))
    reader = open_checkpoint(folder / str(ONE))
    assert (found["kind"], found["step"], found["optimizer"]) == ("deepspeed", SAVED_AT, {"step": SAVED_AT})
    assert found["layout"] == {"world_size": 2, "ep_size": 2, "zero_stage": 2, "precision": "fp32"}
    stored = sum(math.prod(shape) for shape in reader.shapes.values())
    inactive = 2 * 3 * 12 * 16 * (4 - 2)  # two layers, three matrices, two of four experts
    assert found["parameters"]["stored"] == stored
    assert found["parameters"]["active"] == stored - inactive
    assert [row["layer"] for row in found["layers"]] == ["blocks.0.mlp", "blocks.1.mlp"]
    count = reader.buffers()["bank.ema_count_LK"][0].double()
    share = count / count.sum()
    row = found["layers"][0]
    assert row["code_perplexity"] == pytest.approx(float((-share * share.log()).sum().exp()), abs=0.01)
    load = torch.zeros(4, dtype=torch.float64).index_add_(0, reader.buffers()["bank.code_map_LK"][0], share)
    assert row["expert_load"] == pytest.approx(load.tolist(), abs=1e-4)
    rms = reader.tensor("blocks.0.mlp.experts.w1").square().mean(dim=(1, 2)).sqrt()
    assert row["weight_norms"]["w1"]["max"] == pytest.approx(float(rms.max()), abs=1e-5)


def test_loads_that_codes_of_one_layer_do_not_tell_are_left_out(tmp_path, capsys):
    fields = {"codebook.groups": 2, "codebook.source": "token_embedding", "moe.top_k": 0}
    run_ranks(1, write_one, str(tmp_path), Layout(2, 1, 1), fields)
    (path,) = [tag.parent for tag in tmp_path.rglob("manifest.json")]
    first, second = inspect(str(path))["layers"]
    assert "expert_load" in first and "expert_load" not in second and second["codes"] == first["codes"]
    assert main(build_parser("").parse_args([str(path)])) == 0
    assert capsys.readouterr().out.count("busiest expert") == 1


def test_two_checkpoints_are_compared(folder, capsys):
    paths = [str(folder / str(ONE)), str(folder / str(OTHER))]
    differences = inspect(*paths)["differences"]
    assert differences == {
        "layout.ep_size": [2, 1],
        "layout.zero_stage": [2, 3],
        "layout.precision": ["fp32", "bf16"],
    }
    assert main(build_parser("").parse_args(paths)) == 0
    assert "differs: layout.zero_stage: 2 here, 3 there" in capsys.readouterr().out
    assert main(build_parser("").parse_args([paths[0], paths[0]])) == 0
    assert "the two agree" in capsys.readouterr().out


def test_json_of_a_discrete_export(folder, tmp_path, capsys):
    command = [str(folder / str(ONE)), str(tmp_path / "d"), "--to", "discrete-only"]
    assert convert(convert_parser("").parse_args(command)) == 0
    capsys.readouterr()
    assert main(build_parser("").parse_args([str(tmp_path / "d"), str(folder / str(ONE)), "--json", "--verify"])) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "portable" and found["optimizer"] is None
    assert "match their checksums" in found["manifest"]
    assert found["differences"]["config.moe.top_k"] == [0, 1]
    assert found["differences"]["shape.blocks.0.mlp.router.path_gate.bias"] == [None, [2]]


def test_bad_input_is_one_sentence(folder, tmp_path, capsys):
    assert main(build_parser("").parse_args([str(tmp_path / "none")])) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("no such checkpoint folder") and "\n" not in error


def test_flops_of_a_dense_model_by_hand():
    changes = {"model.layers": 1, "model.width": 8, "model.sequence_length": 16, "moe.expert_hidden": 12}
    config = load_config("tiny", None, {"moe.router": "dense", **changes}).config
    shapes = {name: tuple(p.shape) for name, p in MoETransformer(config).named_parameters()}
    attention, mlp, head = 4 * 8 * 8, 3 * 8 * 12, 8 * 256
    products, context = attention + mlp + head, 2 * 2 * 8 * 17 // 2
    norms, embedding = 3 * 8, 8 * 256
    counted = sizes(shapes, config)
    stored = products + norms + embedding
    assert counted == {"stored": stored, "active": stored, "forward_flops_per_token": 2 * products + context}


def test_wide_heads_and_their_norms_are_counted() -> None:
    figures = []
    for changes in ({}, {"head_width": 8, "qk_norm": "full"}):
        config = RunConfig(model={"width": 8, "heads": 2, "layers": 3, "sequence_length": 10, **changes})
        shapes = {name: tuple(p.shape) for name, p in MoETransformer(config).named_parameters()}
        figures.append(sizes(shapes, config))
    narrow, wide = figures
    weights, norms = 3 * 4 * 8 * (16 - 8), 3 * 2 * 16
    assert wide["active"] - narrow["active"] == weights + norms
    assert wide["forward_flops_per_token"] - narrow["forward_flops_per_token"] == 2 * weights + 3 * 2 * 11 * (16 - 8)

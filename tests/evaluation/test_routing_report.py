"""The reports from checkpoint to page: numbers that must hold, escaping, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.evaluation.routed_models import CASES, model_of, tokens_of
from tests.huggingface import ModelReader
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.data.tokenizers import WordTokenizer
from vqmoe_ds.evaluation import routing_report
from vqmoe_ds.evaluation.routing_report import fluctuation, label_tokens, measure_layer, top_tokens, trace_layers
from vqmoe_ds.evaluation.token_labels import pieces_of, readable
from vqmoe_ds.experiments import jacobian_report
from vqmoe_ds.runtime.files import new_folder

TEXT = "The <b>quick</b> dog & the café\nran 42 times.\n" * 60


def _save(folder: Path, case: str, moved: float = 0.0, **changes) -> str:
    model = model_of(case, **changes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "gate" in name or name.startswith("embed"):
            parameter.add_(moved * torch.randn(parameter.shape, generator=generator))
    with new_folder(folder, False) as into:
        write_portable(ModelReader(model), into)
    return str(folder)


def _run(module, *arguments: object) -> int:
    return module.main(module.build_parser("").parse_args([str(a) for a in arguments]))


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_report_of_codes_from_checkpoint_to_page(tmp_path, text, capsys):
    now, before = _save(tmp_path / "now", "vq"), _save(tmp_path / "before", "vq", moved=0.5)
    assert _run(routing_report, now, "--data", text, "--against", before, "--out", tmp_path / "out") == 0
    assert "codes in use" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "routing.json").read_text())
    page = (tmp_path / "out" / "routing.html").read_text()
    assert report["probe"]["tokens"] == sum(report["layers"][0]["codes"]["counts"])
    assert 2 * report["probe"]["tokens"] == sum(report["layers"][0]["experts"]["counts"])
    for row in report["layers"]:
        assert 0 < row["fluctuation"]["codes"] < 1 and 0 < row["fluctuation"]["experts"] <= 1
        assert set(row["information"]["code"]) == {"token id", "token before", "position", "kind", "part of speech"}
        assert abs(row["information"]["code"]["position"]["explained"]) < 0.4
        assert row["collapse"]["after"]["effective_rank"] <= 12
    assert page.count("data:image/png;base64,") == 3 and "http" not in re.sub('base64,[^"]*', "", page)
    assert "&lt;" in page and "&amp;" in page and "␣" in page and "\\n" in page and "\\xc3" in page


def test_jacobians_of_two_models_on_the_same_tokens(tmp_path, text, capsys):
    paths = [_save(tmp_path / name, name) for name in ("vq", "hash_token")]
    assert _run(jacobian_report, *paths, "--data", text, "--tokens", 64, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "jacobian.json").read_text())
    assert [model["name"] for model in report["models"]] == ["vq", "hash_token"]
    for model in report["models"]:
        assert all(len(row["total"]["singular_values"]) == 12 for row in model["layers"])
    assert report["models"][1]["layers"][0]["router"]["frobenius_norm"] == 0
    assert "data:image/png" in (tmp_path / "out" / "jacobian.html").read_text()
    assert "hash_token layer 2" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES)
def test_every_router_can_be_measured(case):
    model, tokens_BS = model_of(case), tokens_of(4)
    pieces = pieces_of(None, 257)
    labels, names = label_tokens(tokens_BS, pieces), readable(pieces)
    for trace in trace_layers(model, tokens_BS):
        row = measure_layer(trace, tokens_BS.flatten(), labels, names)
        assert ("codes" in row) == (model.bank is not None) and "kind" not in labels
        assert sum(entry["total"] for entry in row["expert_tokens"]) == sum(row["experts"]["counts"])
        assert not any(fluctuation(trace, trace).values())
        json.dumps(row, allow_nan=False)


def test_hash_of_tokens_is_explained_by_the_token_and_by_nothing_else():
    tokens_BS = tokens_of(200, vocab=40)
    labels = label_tokens(tokens_BS, [b""] * 257)
    row = measure_layer(trace_layers(model_of("hash_token"), tokens_BS)[0], tokens_BS.flatten(), labels, ["?"] * 257)
    explained = {name: found["explained"] for name, found in row["information"]["expert"].items()}
    assert explained["token id"] == pytest.approx(1)
    assert abs(explained["position"]) < 0.05 and abs(explained["token before"]) < 0.05


def test_top_tokens_are_those_of_a_count_by_hand():
    ids = torch.tensor([0] * 10 + [1] * 6 + [2] * 4 + [0] * 20)
    choices = torch.tensor([0] * 20 + [1] * 20)
    first, second, third = top_tokens(choices, ids, 3, ["a", "b", "c"])
    assert [(t["token"], t["count"]) for t in first["by_count"]] == [("a", 10), ("b", 6), ("c", 4)]
    assert [(t["token"], t["lift"]) for t in first["by_lift"]] == [("b", 2.0), ("a", round(0.5 / 0.75, 3))]
    assert second["by_lift"] == [{"token": "a", "id": 0, "count": 20, "lift": 1.333}]
    assert third == {"total": 0, "by_count": [], "by_lift": []}


def test_fluctuation_counts_tokens_whose_experts_differ():
    model, tokens_BS = model_of("topk, two"), tokens_of(4)
    before = trace_layers(model, tokens_BS, 0)
    model.blocks[2].mlp.router.gate.weight.copy_(torch.randn(4, 12, generator=torch.Generator().manual_seed(3)))
    after = trace_layers(model, tokens_BS, 0)
    found = [fluctuation(*pair) for pair in zip(before, after, strict=True)]
    assert found[0] == found[1] == {"experts": 0, "main_expert": 0}
    sets = [[set(e) for e in t[2].rows.experts_M.view(-1, 2).tolist()] for t in (before, after)]
    assert found[2]["experts"] == sum(a != b for a, b in zip(*sets, strict=True)) / 64


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path, text, capsys):
    vq, topk = _save(tmp_path / "vq", "vq"), _save(tmp_path / "topk", "topk, two")
    out = ("--data", text, "--out", tmp_path / "out")
    for module, arguments, sentence in (
        (routing_report, (tmp_path / "nothing", *out), "no such checkpoint"),
        (routing_report, (vq, "--against", topk, *out), "moe.router=topk.*fluctuation is measured between checkpoints"),
        (routing_report, (vq, *out, "--data", tmp_path / "none"), "does not exist"),
        (routing_report, (vq, "--data", text, "--out", text), "--out .* cannot be written"),
        (routing_report, (vq, "--tokens", 0, *out), "--tokens 0"),
        (jacobian_report, (vq, vq, "--tokens", -3, *out), "--tokens -3"),
    ):
        assert _run(module, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and re.search(sentence, error), error
    assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    assert _run(routing_report, vq, "--data", tmp_path / "none", "--out", tmp_path / "there/new/deeper") == 2
    assert not list((tmp_path / "there").iterdir())


def test_jacobians_need_the_same_tokens(tmp_path, capsys):
    words = WordTokenizer(["the", "dog"])
    words.save(tmp_path / "w.tokenizer")
    first, second = _save(tmp_path / "a", "topk"), _save(tmp_path / "b", "topk", vocab=50)
    arguments = (first, second, "--data", tmp_path, "--out", tmp_path / "out")
    assert _run(jacobian_report, *arguments) == 2
    assert "Jacobians compare on the same tokens only" in capsys.readouterr().err

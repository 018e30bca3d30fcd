"""Routes of two ways to run a model: equal where they must be, counted where they are not."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm
from tests.evaluation.routed_models import CASES, model_of, tokens_of
from tests.huggingface import ModelReader
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.load_model import LoadedModel, load_model
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.experiments import routes
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError
from vqmoe_ds.runtime.files import new_folder


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("expert_choice")])
def test_decoding_with_a_cache_routes_as_the_whole_forward_pass(case: str) -> None:
    model, tokens_BS = model_of(case), tokens_of()
    whole, cached = routes.routes_of(model, tokens_BS), routes.routes_with_cache(model, tokens_BS)
    found = routes.against(whole, cached, "cached")
    assert found.tokens == tokens_BS.numel() and found.differing == 0


def test_what_differs_is_counted_as_sets() -> None:
    reference_LTR = torch.tensor([[[0, 1], [2, 3], [1, 2]], [[0, 1], [0, 1], [0, 1]]])
    other_LTR = torch.tensor([[[1, 0], [2, 0], [1, 2]], [[0, 1], [0, 2], [3, 1]]])
    found = routes.against(reference_LTR, other_LTR, "other", discrete_apart=True)
    assert (found.differing, found.touched) == (pytest.approx(3 / 6), pytest.approx(2 / 3))
    assert found.by_layer == pytest.approx([1 / 3, 2 / 3]) and found.discrete == pytest.approx(3 / 6)
    assert "33.33% 66.67%" in routes.table([found])


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a dual path, with checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("routes")
    (folder / "text.txt").write_text(" ".join(f"{i} words make {i * i % 97} stories." for i in range(900)))
    (folder / "small.yaml").write_text(
        "model: {layers: 2, width: 16, heads: 2, sequence_length: 16}\n"
        "moe: {num_experts: 4, expert_hidden: 16, top_k: 1}\n"
        "train: {batch_size: 4, steps: 4}\nrun: {probe_tokens: 0, sample_tokens: 0, save_every: 2}\n"
    )
    command = ["launchers/pretrain.py", "--config", "small.yaml", "--data", "text.txt", "--run_dir", "run"]
    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = warm.run(words, cwd=folder, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def _ran(*words: str) -> int:
    return routes.main(routes.build_parser("").parse_args(list(words)))


def test_the_command_compares_precisions_caches_exports_and_older_policies(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    older = str(run / "checkpoints" / "global_step0000002")
    report, figure = tmp_path / "routes.json", tmp_path / "routes.png"
    words = [str(run), older, "--ways", "bf16", "cached", "hf", "--tokens", "256"]
    assert _ran(*words, "--json", str(report), "--figure", str(figure)) == 0
    found = {Path(one["way"]).name: one for one in json.loads(report.read_text())["comparisons"]}
    assert list(found) == ["bf16", "cached", "hf", "global_step0000002"]
    assert found["cached"]["differing"] == found["hf"]["differing"] == 0
    assert all(one["tokens"] == 256 and one["discrete"] is not None for one in found.values())
    assert figure.stat().st_size > 1000


def test_routes_that_an_engine_recorded_are_compared_for_its_own_tokens(run: Path, tmp_path: Path, capsys) -> None:
    """The exported model stands for the engine; its last token of each sequence has no routes."""
    transformers = pytest.importorskip("transformers")
    assert transformers
    asked, recorded = tmp_path / "asked.jsonl", tmp_path / "recorded.jsonl"
    assert _ran(str(run), "--ways", "bf16", "--tokens", "48", "--record", str(asked)) == 0
    loaded = load_model(run)
    sequences = [json.loads(line)["tokens"] for line in asked.read_text().splitlines()]
    assert [len(tokens) for tokens in sequences] == [16, 16, 16]
    routes_LTR = routes.routes_of_export(loaded, "hf", torch.tensor(sequences))
    experts = routes_LTR.unflatten(1, (3, 16)).permute(1, 2, 0, 3).tolist()
    experts[1][4][1] = [(expert + 1) % 4 for expert in experts[1][4][1]]  # one token in one of two layers
    lines = [
        json.dumps({"tokens": tokens, "experts": rows[: 15 - number]})
        for number, (tokens, rows) in enumerate(zip(sequences, experts, strict=True))
    ]
    recorded.write_text("\n".join(lines) + "\n\n")
    report = tmp_path / "routes.json"
    assert _ran(str(run), str(recorded), str(asked), "--ways", "--json", str(report)) == 0
    engine, own = json.loads(report.read_text())["comparisons"]
    assert (engine["tokens"], own["tokens"], own["differing"]) == (15 + 14 + 13, 48, 0)
    assert engine["differing"] == pytest.approx(1 / 84) and engine["by_layer"] == pytest.approx([0, 1 / 42])
    assert _ran(str(run), str(recorded), "--ways", "--tokens", "16", "--json", str(report)) == 0
    assert json.loads(report.read_text())["comparisons"][0]["tokens"] == 15 + 14, "whole sequences, until it is enough"
    assert recorded.name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "holds no routes"),
        ("[1]", "is not JSON with the lists tokens and experts"),
        ("{", "is not JSON with the lists tokens and experts"),
        ("\xff", "is not JSON with the lists tokens and experts"),
        ({"tokens": [1, 2], "experts": [[[0, 1]], [[0]]]}, "is not JSON with the lists"),
        ({"tokens": [10**30], "experts": [[[0, 1], [0, 1]]]}, "is not JSON with the lists"),
        ({"tokens": [1, 2], "experts": []}, "one list of experts per token and layer"),
        ({"tokens": 1, "experts": 2}, "one list of experts per token and layer"),
        ({"tokens": [1], "experts": [[[0, 1], [0, 1]]] * 2}, "one list of experts per token and layer"),
        ({"tokens": [1.5], "experts": [[[0, 1], [0, 1]]]}, "not one whole number per token"),
        ({"tokens": [1] * 17, "experts": [[[0, 1], [0, 1]]] * 17}, "routes of 17 tokens; this model reads 16 at once"),
        ({"tokens": [1], "experts": [[[0, 4], [0, 1]]]}, "line 1 names expert 4; this model has 0 to 3"),
        ({"tokens": [-1], "experts": [[[0, 1], [0, 1]]]}, "line 1 names token -1; this model has 0 to 255"),
        ({"tokens": [1], "experts": [[[0], [0]]]}, "of 2 layers and 1 experts per token; this model has 2 MoE layers"),
    ],
)
def test_a_file_that_has_no_routes_of_the_model_is_one_sentence(run: Path, tmp_path: Path, capsys, line, part) -> None:
    path = tmp_path / "recorded.jsonl"
    path.write_bytes((line if isinstance(line, str) else json.dumps(line)).encode("latin-1"))
    assert _ran(str(run), str(path), "--ways") == 2
    said = capsys.readouterr().err
    assert part in said and str(path) in said and said.count("\n") == 1


def test_what_cannot_be_compared_is_one_sentence(run: Path, capsys: Any, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shape = {"vocab_size": 257, "layers": 2, "width": 16, "heads": 2, "sequence_length": 16}
    with new_folder(dense, False) as into:
        write_portable(ModelReader(MoETransformer(RunConfig(model=shape, moe={"router": "dense"}))), into)
    for words, part in (
        ((str(run), "--ways"), "nothing to compare with"),
        ((str(run), "--ways", "mixtral"), "not its linear router (topk)"),
        ((str(run), str(run / "nothing")), "nothing"),
        ((str(run), str(run / "nothing.jsonl")), "nothing.jsonl cannot be read: No such file"),
        ((str(run), "--tokens", "0"), "leaves nothing to read"),
        ((str(run), str(dense), "--ways"), "is a dense model (moe.router=dense)"),
    ):
        assert _ran(*words) == 2
        said = capsys.readouterr().err
        assert part in said and said.count("\n") == 1


def test_no_output_is_written_over_an_input_or_another_output(run: Path, capsys: Any, tmp_path: Path) -> None:
    recorded, link = tmp_path / "recorded.jsonl", tmp_path / "folder"
    assert _ran(str(run), "--ways", "bf16", "--tokens", "16", "--record", str(recorded)) == 0
    before = recorded.read_text()
    link.symlink_to(tmp_path)
    capsys.readouterr()
    for words in (
        (str(recorded), "--ways", "--record", str(link / recorded.name)),
        (str(recorded), "--ways", "--json", str(recorded)),
        ("--ways", "bf16", "--data", str(recorded), "--json", str(recorded)),
        ("--ways", "bf16", "--json", str(tmp_path / "new"), "--record", str(tmp_path / "new")),
    ):
        assert _ran(str(run), *words) == 2
        assert "which would be written over; name another file" in capsys.readouterr().err
    assert recorded.read_text() == before and not (tmp_path / "new").exists()


def test_what_fails_fails_before_the_ways_that_take_long(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(routes, "_routes_by", lambda *_: pytest.fail("a way was tried"))
    for words in ((str(run / "nothing"),), ("--ways", "bf16", "mixtral")):
        assert _ran(str(run), *words) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err


def test_a_choice_of_tokens_beyond_the_text_takes_all_of_it(run: Path, tmp_path: Path) -> None:
    report = tmp_path / "routes.json"
    found = []
    for tokens in ("100000", "99999999999999999999"):
        assert _ran(str(run), "--ways", "bf16", "--tokens", tokens, "--json", str(report)) == 0
        found.append(json.loads(report.read_text())["comparisons"][0])
    assert found[0] == found[1] and found[0]["tokens"] % 16 == 0


@pytest.mark.parametrize("windows", [1, 8, 21])
def test_windows_are_read_a_few_at_a_time_and_told(windows: int) -> None:
    model, tokens_BS = model_of("topk, two"), tokens_of(rows=windows)
    done: list[int] = []
    whole = routes.routes_of(model, tokens_BS, done.append)
    assert sum(done) == windows and max(done) <= 8
    assert torch.equal(whole, torch.cat([routes.routes_of(model, row[None]) for row in tokens_BS], dim=1))


def test_all_experts_count_where_their_number_grows_over_a_run() -> None:
    """smoe_dropout: what a layer tells for diagnostics are the first ``moe.top_k`` alone."""
    model = model_of("smoe_dropout")
    for count, steps in ((1, 0), (4, 10**6)):
        for layer in model.moe_layers():
            layer.router._updates.write(layer.router.updates, steps)
        assert routes.routes_of(model, tokens_of()).shape[-1] == count
    few, many = torch.tensor([[[2], [1]]]), torch.tensor([[[2, 0], [1, 3]]])
    assert routes.against(many, routes.padded(few, many), "earlier").differing == 1
    assert torch.equal(routes.padded(many, few), many)


def test_tokens_with_different_numbers_of_experts_are_not_recorded(tmp_path: Path) -> None:
    tokens_BS = tokens_of(1)[:, :2]
    with pytest.raises(ConfigError, match="gives tokens different numbers of experts; leave it out"):
        routes.write_routes(tmp_path / "routes.jsonl", tokens_BS, torch.tensor([[[0, 1], [1, -1]]]))
    assert not (tmp_path / "routes.jsonl").exists()


def test_a_file_that_could_not_be_written_is_refused_before_any_work(run: Path, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for option in ("--json", "--figure", "--record"):
        for place in (tmp_path, tmp_path / "nothing" / "x", tmp_path / "file" / "x"):
            assert _ran(str(run / "not there"), option, str(place)) == 2
            reason = "is a folder" if place == tmp_path else "lies in no folder that exists"
            assert f"{option} {place} {reason}; name a file in a folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "theirs", "part"),
    [
        ({"vocab_size": 300}, {"tokenizer_sha256": "e" * 64}, "it reads the ids of another tokenizer"),
        ({"vocab_size": 20}, {}, "its vocabulary has 20 tokens, not 257"),
        ({"sequence_length": 8}, {}, "it reads 8 tokens at once, not 16"),
        ({}, {"num_experts": 8}, "8 experts, not 4"),
        ({"layers": 2}, {}, "other layers or experts per token"),
    ],
)
def test_another_model_is_told_from_the_same_at_another_step(monkeypatch, model, theirs, part) -> None:
    """None of them may be run: ids could lie past its vocabulary, or mean other words."""

    def loaded(model: dict[str, Any], checksum: str | None = None, num_experts: int = 4) -> LoadedModel:
        shape = {"vocab_size": 257, "layers": 3, "width": 12, "heads": 2, "sequence_length": 16, **model}
        moe = {"router": "topk", "num_experts": num_experts, "expert_hidden": 10}
        config = RunConfig(model=shape, moe=moe, data={"tokenizer_sha256": checksum})
        return LoadedModel(config, MoETransformer(config).eval(), None, 0, Path("two"), "portable")

    ours = dataclasses.replace(loaded({}, "a" * 64), path=Path("one"))
    other = loaded(model, theirs.get("tokenizer_sha256"), theirs.get("num_experts", 4))
    models = {"one": ours, "two": other}
    monkeypatch.setattr(routes, "load_routed", lambda path, *_given: models[path])
    monkeypatch.setattr(routes, "read_probe", lambda *_given: tokens_of())
    args = routes.build_parser("").parse_args(["one", "two", "--ways"])
    with pytest.raises(CheckpointError, match=f"^two is another model than one: {part}$"):
        routes.compare(args)
    models["two"] = loaded({}, "a" * 64)
    assert routes.compare(args)[0].differing == 0

"""Models whose experts stay in their checkpoint: the same text and figures, from every format, within the budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluation.routed_models import CASES, LENGTH, VOCAB, model_of, tokens_of
from tests.fake_gpu import fake_gpus
from tests.huggingface import ModelReader
from vqmoe_ds.checkpoint import load_experts
from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf
from vqmoe_ds.checkpoint.formats.megatron.writer import export_megatron
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.io.archive import Stored
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.checkpoint.reader import Piece
from vqmoe_ds.evaluation.generate import Sampling, generate
from vqmoe_ds.evaluation.generate_command import build_parser, main
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.files import new_folder
from vqmoe_ds.runtime.memory import parse_memory

ROOT = Path(__file__).resolve().parents[2]
EXPERT = 3 * 10 * 12 * 4
"""Bytes of an expert of these models."""
KNOWN = {
    "token codes": {"moe": {"top_k": 0}, "codebook": {"num_codes": 9, "source": "token_embedding"}},
    "context codes": {"moe": {"top_k": 0}, "codebook": {"num_codes": 9}},
    "hash_token": {},
}


def _model(case: str) -> MoETransformer:
    CASES.update({f"vq, {name}": sections for name, sections in KNOWN.items() if name != "hash_token"})
    return model_of(f"vq, {case}" if f"vq, {case}" in CASES else case)


def _save(folder: Path, model: MoETransformer) -> str:
    with new_folder(folder, False) as into:
        write_portable(ModelReader(model), into)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("experts")
    return {case: _save(folder / case, _model(case)) for case in [*KNOWN, "vq", "topk, two", "vq, early block"]}


@pytest.fixture(params=["much memory", "no memory"])
def left(request, monkeypatch) -> str:
    """Memory that is left to cache all experts, or none: they are read past the page cache."""
    if request.param == "no memory":
        monkeypatch.setattr(load_experts, "free_bytes", lambda: 0)
    return request.param


def _readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "expert reader"]


def _ids(model: MoETransformer, count: int) -> list[int]:
    return list(islice(generate(model, [84, 104, 101], Sampling(), LENGTH, VOCAB, model.new_cache), count))


# ---------------------------------------------------------------- the same bits, and nothing read in vain


@pytest.mark.parametrize("experts", [1, 3, 100])
@pytest.mark.parametrize("case", [*KNOWN, "vq", "topk, two", "vq, early block"])
def test_logits_and_text_are_those_of_the_model_in_memory_to_the_bit(checkpoints, case, experts, left):
    whole, loaded = load_model(checkpoints[case]), load_model(checkpoints[case], expert_memory=experts * EXPERT + 100)
    with torch.no_grad():
        for seed in range(2):
            assert torch.equal(loaded.model(tokens_of(seed=seed))[0], whole.model(tokens_of(seed=seed))[0])
    assert _ids(loaded.model, 2 * LENGTH) == _ids(whole.model, 2 * LENGTH)
    assert loaded.store.most_held <= experts
    if not case.startswith(
        "vq"
    ):  # one read for its code may give way to one that the same token's learned router asks for earlier
        assert loaded.store.reads <= loaded.store.uses
    assert len(_readers()) > 0
    loaded.close()
    assert not _readers()


@pytest.mark.parametrize("case", KNOWN)
def test_known_ahead_the_experts_of_all_layers_are_read_once_and_no_others(checkpoints, case):
    whole, loaded = load_model(checkpoints[case]), load_model(checkpoints[case], expert_memory=12 * EXPERT)
    needed: set[tuple[int, int]] = set()
    begun: list[tuple[int, int, str]] = []
    source = loaded.store.source

    def recorded(layer: int, expert: int, part: str, out: torch.Tensor) -> None:
        begun.append((layer, expert, part))
        source.fetch(layer, expert, part, out)

    loaded.store.source = source._replace(fetch=recorded)
    for number, layer in enumerate(whole.model.moe_layers()):
        layer.register_forward_hook(
            lambda _, __, out, n=number: needed.update((n, e) for e in out[2].flatten().tolist())
        )
    tokens_BS = torch.tensor([[84, 104, 84]])
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens_BS)[0], whole.model(tokens_BS)[0])
    loaded.close()
    assert sorted(begun) == sorted((*key, part) for key in needed for part in ("w1", "w2", "w3"))
    assert loaded.store.bytes_read == len(needed) * EXPERT < 12 * EXPERT


def test_all_layers_are_told_before_the_first_computes_and_learned_routers_tell_one_at_a_time(checkpoints):
    for case, first in (("token codes", [0, 1, 2]), ("topk, two", [0])):
        loaded, told = load_model(checkpoints[case], expert_memory=100 * EXPERT), []
        expect, lent = loaded.store.expect, loaded.store.lent
        loaded.store.expect = lambda layer, rows, expect=expect, told=told: told.append(layer) or expect(layer, rows)
        loaded.store.lent = lambda *key, lent=lent, told=told: told.append("lent") or lent(*key)
        with torch.no_grad():
            loaded.model(tokens_of())
        loaded.close()
        assert list(dict.fromkeys(told[: told.index("lent")])) == first


def test_bf16_is_rounded_as_in_memory(checkpoints, left):
    answers = []
    for memory in (None, 2 * EXPERT):
        loaded = load_model(checkpoints["vq"], precision="bf16", expert_memory=memory)
        with torch.no_grad():
            answers.append(loaded.model(tokens_of())[0])
        loaded.close()
    assert torch.equal(*answers) and loaded.store.rooms == 4, "an expert takes half the bytes"


@pytest.mark.parametrize("direct", [True, False])
def test_experts_that_do_not_fit_are_read_past_the_cache_where_the_file_system_can(checkpoints, monkeypatch, direct):
    usual: list[int] = []
    read_into = Stored.read_into

    def recorded(stored: Stored, start: int, out: torch.Tensor) -> None:
        usual.append(start)
        read_into(stored, start, out)

    whole = load_model(checkpoints["vq"])
    monkeypatch.setattr(load_experts, "free_bytes", lambda: 12 * EXPERT + 3 * EXPERT)
    monkeypatch.setattr(Stored, "read_into", recorded)
    # 3 layers of 4 experts, each as large in its file as in memory, and the budget
    for memory, beyond in ((3, False), (4, True)):
        loaded = load_model(checkpoints["vq"], expert_memory=memory * EXPERT)
        usual.clear()
        if not direct:
            monkeypatch.setattr(load_experts, "read_past_cache", lambda *_: False)
        with torch.no_grad():
            assert torch.equal(loaded.model(tokens_of())[0], whole.model(tokens_of())[0])
        loaded.close()
        assert bool(usual) != (beyond and direct)


class _Stretches:
    """A reader of one parameter, in one piece or in none."""

    def __init__(self, path: Path, values: torch.Tensor, whole: bool) -> None:
        path.write_bytes(values.numpy().tobytes())
        self.values, self.whole, self.read_counts = values, whole, list[int]()
        self.stored = Stored(str(path), 0, values.dtype, (len(values),))

    def pieces(self, _name: str) -> list[Piece]:
        return [Piece(0, len(self.values), self.stored, 0)] if self.whole else []

    def read(self, _name: str, _kind: str, start: int, count: int) -> torch.Tensor:
        self.read_counts.append(count)
        return self.values[start : start + count]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("size", [5, 1 << 14, (1 << 20) + 7424])
def test_experts_of_any_size_are_converted_in_stretches(tmp_path, size, whole, dtype, cached):
    reader: Any = _Stretches(tmp_path / "values", torch.randn(3 + 2 * size), whole)
    out = torch.empty(size, dtype=dtype)
    load_experts._fill(out, reader, "name", 3 + size, cached)
    assert torch.equal(out, reader.values[3 + size :].to(dtype))
    assert reader.read_counts == ([] if whole else [size]), "whoever has no pieces puts an expert together at once"


def test_checkpoints_of_other_formats_are_read_in_place(tmp_path, left):
    model = _model("topk, two")
    reader = ModelReader(model)
    for dtype in ("float32", "bfloat16"):
        export_hf(reader, tmp_path / dtype, ExportOptions(dtype=dtype, tokenizer="none"))
    export_hf(reader, tmp_path / "mixtral", ExportOptions(arch="mixtral", tokenizer="none"))
    export_megatron(reader, tmp_path / "megatron")
    for folder in sorted(tmp_path.iterdir()):
        whole, loaded = load_model(folder), load_model(folder, expert_memory=3 * EXPERT)
        with torch.no_grad():
            assert torch.equal(loaded.model(tokens_of())[0], whole.model(tokens_of())[0]), folder
        loaded.close()


# ---------------------------------------------------------------- the commands


def _generate(*arguments: str) -> int:
    return main(build_parser("").parse_args([*arguments, "--prompt", "The ", "--tokens", "40"]))


@pytest.mark.parametrize("case", ["token codes", "context codes", "topk, two"])
def test_the_command_writes_the_same_text_and_leaves_no_thread(checkpoints, capsys, case):
    assert _generate(checkpoints[case]) == 0
    text = capsys.readouterr().out
    assert _generate(checkpoints[case], "--expert_memory", "5KiB", "--timing") == 0
    found = capsys.readouterr()
    assert found.out == text and not _readers()
    assert "experts: " in found.err and len(found.err.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MiB", 256 << 20), ("4GB", 4 * 10**9), ("1.5 kib", 1536), ("700", 700), ("12B", 12), (None, None)],
)
def test_sizes_are_read_as_written(text, size):
    assert parse_memory(text, "--expert_memory") == size


@pytest.mark.parametrize("text", ["many", "0", "0.4B", "-1GB", "9" * 400 + "GB", "1e9", "2 GBs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"--max_shard '.*' is no size; write it like 256MiB or 4GB"):
        parse_memory(text, "--max_shard")


@pytest.mark.parametrize(
    ("size", "part"),
    [
        ("1KiB", "1,024 bytes is less than one expert of "),
        ("1KiB", "takes; give 1,440 or more, such as --expert_memory 2KiB"),
        ("much", "--expert_memory 'much' is no size; write it like 256MiB or 4GB"),
        ("-3GB", "is no size"),
    ],
)
def test_sizes_that_cannot_be_are_one_sentence(checkpoints, capsys, size, part):
    assert _generate(checkpoints["topk, two"], f"--expert_memory={size}") == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(("damage", "part"), [(Path.unlink, "cannot be read: No such file"), (_cut, "is cut short")])
@pytest.mark.parametrize("case", ["token codes", "topk, two"])
def test_a_file_that_goes_while_text_is_written_ends_it_with_one_sentence(
    tmp_path, capsys, monkeypatch, damage, part, case, left
):
    folder = Path(_save(tmp_path / "model", _model(case)))

    def load_and_damage(*args: Any, **options: Any) -> Any:
        loaded = load_model(*args, **options)
        damage(folder / "model-00001-of-00001.safetensors")
        return loaded

    monkeypatch.setattr("vqmoe_ds.checkpoint.load_model.load_model", load_and_damage)
    assert _generate(str(folder), "--expert_memory", "6KiB") == 2
    found = capsys.readouterr()
    assert found.out == "The " and part in found.err and found.err.count("\n") == 1
    assert not _readers()


def test_it_is_refused_where_it_would_serve_nothing(checkpoints, tmp_path):
    with fake_gpus(1), pytest.raises(ConfigError, match="experts on a CPU; leave it out on a GPU"):
        load_model(checkpoints["vq"], device="cuda:0", expert_memory=1 << 20)
    with pytest.raises(ConfigError, match="all experts on one rank"):
        load_model(checkpoints["vq"], ep_size=2, expert_memory=1 << 20)
    dense = model_of("vq").config.model_copy(
        update={"moe": model_of("vq").config.moe.model_copy(update={"router": "dense", "top_k": 1})}
    )
    with pytest.raises(ConfigError, match="has no experts"):
        load_model(_save(tmp_path / "dense", MoETransformer(dense)), expert_memory=1 << 20)


@pytest.mark.parametrize("case", ["context codes", "topk, two"])
def test_an_evaluation_gives_the_same_figures(checkpoints, tmp_path, case):
    (tmp_path / "text.txt").write_text("The old captain had never seen a ship like that. " * 9, encoding="ascii")
    results = []
    for name, more in (("whole", []), ("stored", ["--expert_memory", "4KiB"])):
        target = tmp_path / f"{name}.json"
        line = [
            sys.executable,
            str(ROOT / "launchers/evaluate.py"),
            checkpoints[case],
            "--data",
            str(tmp_path / "text.txt"),
        ]
        done = subprocess.run([*line, "--json", str(target), *more], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        results.append((json.loads(target.read_text(encoding="utf-8")), done.stdout))
    assert results[0][0] == results[1][0]
    assert "experts: " in results[1][1] and "experts: " not in results[0][1]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    target = tmp_path / "figures.json"
    line = [sys.executable, str(ROOT / "benchmarks/expert_memory.py"), "--small", "--batch", "2", "--steps", "3"]
    done = subprocess.run([*line, "--json", str(target)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text(encoding="utf-8"))
    assert [row["mode"] for row in rows] == ["in memory", "on demand", "read ahead"]
    assert len({row["ids"] for row in rows}) == 1 and len(rows[0]["turns"]) == 3
    assert sum(turn["read"] for turn in rows[0]["turns"]) == 0 < sum(turn["read"] for turn in rows[2]["turns"])

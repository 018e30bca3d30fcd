"""Run folders are of use from any directory, and after being moved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_tokenizers import ODD
from tests.huggingface import ModelReader, config_of, model_of
from tests.prepared import write_texts
from vqmoe_ds.checkpoint.load_model import find_tokenizer
from vqmoe_ds.checkpoint.whereabouts import (
    FOLDER,
    keep_tokenizer,
    kept_tokenizer,
    whole_task,
    with_whole_paths,
    without_paths,
)
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.tokenizers import WordTokenizer


def _config(**overrides: Any) -> RunConfig:
    return load_config("tiny", None, {name.replace("__", "."): value for name, value in overrides.items()}).config


def test_every_path_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2:odd").write_bytes(b"a file of that name")
    config = with_whole_paths(
        _config(
            data__path=["0.25:../d/wt", "wt", "2:odd"],
            data__valid_path="v.txt",
            data__tokenizer="t.model",
            data__cache_dir="c",
            finetune__checkpoint="runs/x",
            finetune__task="mine=sets/mine",
        )
    )
    above = tmp_path.parent
    assert config.data.path == [f"0.25:{above}/d/wt", f"{tmp_path}/wt", f"{tmp_path}/2:odd"]
    rest = (config.data.valid_path, config.data.tokenizer, config.data.cache_dir, config.finetune.checkpoint)
    assert rest == (f"{tmp_path}/v.txt", f"{tmp_path}/t.model", f"{tmp_path}/c", f"{tmp_path}/runs/x")
    assert config.finetune.task == f"mine={tmp_path}/sets/mine"
    assert with_whole_paths(config) == config
    nothing = _config(data__tokenizer="bytes")
    assert with_whole_paths(nothing) == nothing
    assert [whole_task(task) for task in ("lm", "sst2", None, "a.csv")] == ["lm", "sst2", None, f"{tmp_path}/a.csv"]


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, ModelReader]:
    """A run folder and a reader of a checkpoint in it, trained on data that lay at a path that means nothing now."""
    words = WordTokenizer([*dict.fromkeys(" ".join(ODD).split())])
    words.save(tmp_path / "w.tokenizer")
    write_texts(tmp_path / "wt", ["some words"], str(tmp_path / "w.tokenizer"))
    config = config_of("top-2", vocab=words.vocab_size)
    data = config.data.model_copy(update={"path": str(tmp_path / "wt"), "tokenizer_sha256": words.checksum})
    config = config.model_copy(update={"data": data})
    tag = tmp_path / "run" / "checkpoints" / "global_step0000001"
    tag.mkdir(parents=True)
    keep_tokenizer(config, tmp_path / "run")
    reader = ModelReader(model_of(config))
    reader.path = tag
    return tmp_path, reader


def test_what_others_see_has_no_folders_of_ours() -> None:
    saved = load_config("tiny", None, {"moe.router": "token_table", "router.path": "/home/me/tables/a=b.safetensors"})
    saved = saved.config.model_dump(mode="json")
    saved["data"] |= {"path": "/home/me/text", "tokenizer_sha256": "e" * 64}
    for task, shown in (("/home/me/mails", "mails"), ("mails=/home/me/x", "mails"), ("sst2", "sst2"), (None, None)):
        saved["finetune"] |= {"checkpoint": "/home/me/runs/pretrain", "task": task}
        seen = without_paths(saved)
        assert "/home" not in json.dumps(seen) and seen["data"] == {"tokenizer_sha256": "e" * 64} and "run" not in seen
        assert (seen["finetune"]["checkpoint"], seen["finetune"]["task"]) == ("pretrain", shown)
        assert seen["router"]["path"] == "a=b.safetensors" and seen["moe"] == saved["moe"]
    assert saved["finetune"]["checkpoint"] == "/home/me/runs/pretrain", "what is given stays as it is"


def test_a_moved_run_brings_its_tokenizer(run: tuple[Path, ModelReader], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reader = run
    config = RunConfig(**reader.config)
    assert json.loads((folder / "run" / FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["kind"] == "word"
    for path in folder.glob("w*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "run").rename(folder / "moved")
    reader.path = folder / "moved" / reader.path.relative_to(folder / "run")
    monkeypatch.chdir(reader.path)
    for path in (reader.path, folder / "moved", Path()):
        assert kept_tokenizer(path, config.data.tokenizer_sha256) is not None
    found = find_tokenizer(reader, config)
    assert found is not None and found.checksum == config.data.tokenizer_sha256
    (folder / "moved" / FOLDER / "vocab.txt").write_text("other\n", encoding="utf-8")
    assert find_tokenizer(reader, config) is None


def test_a_tokenizer_beside_the_run_is_no_copy_of_its_own(run: tuple[Path, ModelReader]) -> None:
    folder, reader = run
    (folder / "w.tokenizer").rename(folder / FOLDER)
    data = {**reader.config["data"], "tokenizer": str(folder / FOLDER)}
    keep_tokenizer(RunConfig(**{**reader.config, "data": data}), folder / "runs" / "pretrain")
    assert (folder / "runs" / "pretrain" / FOLDER).is_dir()


@pytest.mark.parametrize("how", ["0.5:{}", "{}.idx", "{}.bin"])
def test_the_tokenizer_is_kept_however_the_data_are_named(run: tuple[Path, ModelReader], how: str) -> None:
    folder, reader = run
    (folder / "a:b").mkdir()
    write_texts(folder / "a:b" / "wt", ["some words"], str(folder / "w.tokenizer"))
    for number, prefix in enumerate((folder / "wt", folder / "a:b" / "wt")):
        path = how.format(prefix)
        data = {**reader.config["data"], "path": [path, path] if how.startswith("0") else path}
        keep_tokenizer(RunConfig(**{**reader.config, "data": data}), folder / "runs" / str(number))
        assert (folder / "runs" / str(number) / FOLDER).is_dir(), path


def test_a_damaged_copy_is_not_asked_where_the_recorded_path_serves(run: tuple[Path, ModelReader]) -> None:
    folder, reader = run
    (folder / "run" / FOLDER / "vocab.txt").write_text("other\n", encoding="utf-8")
    assert find_tokenizer(reader, RunConfig(**reader.config)) is not None


def test_bytes_unknown_and_large_tokenizers_are_not_copied(run: tuple[Path, ModelReader], tmp_path: Path) -> None:
    config = RunConfig(**run[1].config)
    for number, changed in enumerate((None, "unknown")):
        other = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer_sha256": changed})})
        keep_tokenizer(other, tmp_path / str(number))
    keep_tokenizer(config, tmp_path / "small", most_bytes=10)
    assert not {"0", "1", "small"} & set(os.listdir(tmp_path))

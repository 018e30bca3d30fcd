"""Text that a run prepares when it starts: which, once, by one process, and what is said where it cannot be."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data import at_start
from vqmoe_ds.data.at_start import check_at_start, prepared, to_prepare
from vqmoe_ds.data.index_files import check_prefix
from vqmoe_ds.data.indexed import open_indexed_text
from vqmoe_ds.runtime.errors import ConfigError, DataError
from vqmoe_ds.runtime.ranks import Place

ALONE = Place(0, 1, 0, 1)
SHORT = RunConfig().model.model_copy(update={"sequence_length": 8})


def config_of(**fields: Any) -> RunConfig:
    return load_config(overrides={f"data.{name}": value for name, value in fields.items()}).config


def texts_of(prefix: str) -> list[str]:
    """The documents of a corpus of bytes."""
    header = check_prefix(prefix)
    ids = header.ids[: int(header.lengths.sum())]
    return bytes(int(i) if i < 256 else 0 for i in ids).decode().split("\0")[:-1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "crawl"
    folder.mkdir()
    for part in range(2):
        rows = [json.dumps({"content": f"story {part} {row}", "n": row}) for row in range(3)]
        (folder / f"{part}.jsonl").write_text("\n".join(rows))
    return folder


STORIES = [f"story {part} {row}" for part in range(2) for row in range(3)]


def test_a_folder_of_json_lines_becomes_the_documents_under_the_key(source: Path, tmp_path: Path) -> None:
    config = config_of(path=str(source), tokenizer="bytes", text_key="content", valid_path=str(source / "1.jsonl"))
    assert to_prepare(config)
    said: list[str] = []
    data = prepared(config, tmp_path / "run/data_index", ALONE, said.append).data
    assert isinstance(data.path, str) and isinstance(data.valid_path, str)
    assert texts_of(data.path) == STORIES and texts_of(data.valid_path) == STORIES[3:]
    assert Path(data.path).parent == tmp_path / "run/data_index"
    assert (data.tokenizer, data.text_key, data.max_tokens) == (None, "text", None), "it says all that is still to do"
    assert len(said) == 2 and str(source) in said[0]
    assert sorted(path.suffix for path in Path(data.path).parent.iterdir()) == sorted(
        2 * [".bin", ".idx", ".json", ".tokenizer"]
    ), "nothing else stays"


def test_what_is_there_is_taken_and_what_changed_is_prepared_anew(source: Path, tmp_path: Path) -> None:
    config = config_of(path=str(source), tokenizer="bytes", text_key="content")
    first = prepared(config, tmp_path / "index", ALONE, print).data.path
    made = os.stat(f"{first}.bin").st_mtime_ns
    assert prepared(config, tmp_path / "index", ALONE, pytest.fail).data.path == first
    assert os.stat(f"{first}.bin").st_mtime_ns == made
    (source / "0.jsonl").write_text(json.dumps({"content": "another"}))
    second = prepared(config, tmp_path / "index", ALONE, print).data.path
    assert second != first and texts_of(str(second)) == ["another", *STORIES[3:]]
    limited = config_of(path=str(source), tokenizer="bytes", text_key="content", max_tokens=20)
    third = prepared(limited, tmp_path / "index", ALONE, print).data.path
    assert texts_of(str(third)) == ["another", "story 1 0"], "the first documents, as many as 20 tokens hold"


def test_a_hub_set_is_streamed_no_further_than_it_is_wanted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    read: list[str] = []
    load = datasets.load_dataset

    def watched(*args: Any, **options: Any) -> Any:
        assert options["streaming"]
        data = load(*args, **options)
        return data.map(lambda row: read.append(row["content"]) or row)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    config = config_of(path=f"hf:{source}:train", tokenizer="bytes", text_key="content", max_tokens=10)
    data = prepared(config, tmp_path / "index", ALONE, print).data
    assert texts_of(str(data.path)) == STORIES[:1]
    assert set(read) <= set(STORIES[:3]), "of the second file nothing is wanted"


def test_prepared_corpora_of_a_blend_stay_and_the_others_are_prepared(source: Path, tmp_path: Path) -> None:
    config = config_of(path=str(source), tokenizer="bytes", text_key="content")
    there = prepared(config, tmp_path / "index", ALONE, print).data.path
    blend = config_of(path=[f"0.7:{there}", f"0.3:{source / '1.jsonl'}"], tokenizer="bytes", text_key="content")
    data = prepared(blend, tmp_path / "other", ALONE, print).data
    assert isinstance(data.path, list) and data.path[0] == f"0.7:{there}" and data.path[1].startswith("0.3:")
    assert texts_of(data.path[1].removeprefix("0.3:")) == STORIES[3:]
    assert data.tokenizer == "bytes", "of the corpus that was there, which may not name its own"
    os.unlink(f"{there}.json")
    beside = config_of(path=str(source), tokenizer="bytes", text_key="content", valid_path=there)
    prepared_config = prepared(beside, tmp_path / "other", ALONE, print)
    assert prepared_config.data.tokenizer == "bytes"
    opened = open_indexed_text(prepared_config.model_copy(update={"model": SHORT}))
    assert opened is not None and opened.tokenizer is not None


def _rank(config: RunConfig, folder: Path, place: Place, answers: Any) -> None:
    said: list[str] = []
    answers.put((place.local_rank, str(prepared(config, folder, place, said.append).data.path), len(said)))


@pytest.mark.parametrize("locks", [True, False])
def test_one_of_many_processes_prepares_and_the_others_wait(
    locks: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    def slow(options: Any, prepare: Callable[[Any], Any] = at_start.prepare.prepare) -> None:
        time.sleep(0.5)
        prepare(options)

    monkeypatch.setattr(at_start.prepare, "prepare", slow)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", unknown)
    config = config_of(path=str(source), tokenizer="bytes", text_key="content")
    fork = multiprocessing.get_context("fork")
    answers, places = fork.Queue(), [Place(rank, 6, rank % 2, 2) for rank in range(6)]  # three machines, one folder
    ranks = [fork.Process(target=_rank, args=(config, tmp_path / "index", place, answers)) for place in places]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert len({prefix for _, prefix, _ in found}) == 1
    assert sum(said for local_rank, _, said in found if local_rank == 0) == 1, "one says that it prepares"
    assert sum(said for local_rank, _, said in found if local_rank) == 0


def test_a_lock_that_goes_meanwhile_is_not_missed(source: Path, tmp_path: Path) -> None:
    config = config_of(path=str(source), tokenizer="bytes", text_key="content")

    def remove(line: str) -> None:
        (lock,) = (tmp_path / "index").glob("*.lock")
        lock.unlink()

    assert texts_of(str(prepared(config, tmp_path / "index", ALONE, remove).data.path)) == STORIES


def test_what_a_killed_process_left_is_taken_over_and_what_beats_is_waited_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_start, "PATIENCE", 0.5)
    monkeypatch.setattr(at_start, "SAY_EVERY", 0.0)
    config = config_of(path=str(source), tokenizer="bytes", text_key="content")
    path = Path(str(prepared(config, tmp_path / "index", ALONE, print).data.path))
    for file in path.parent.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    lock, said = path.with_name(f"{path.name}.lock"), []
    lock.touch()

    def say(line: str) -> None:
        said.append(line)
        if len(said) < 10:
            lock.touch()

    assert texts_of(str(prepared(config, tmp_path / "index", ALONE, say).data.path)) == STORIES
    preparing = next(number for number, line in enumerate(said) if line.startswith("preparing"))
    assert preparing > 10 and not lock.exists()


def test_what_a_killed_process_of_this_host_left_is_taken_over_at_once(source: Path, tmp_path: Path) -> None:
    config = config_of(path=str(source), tokenizer="bytes", text_key="content")
    begun, fork = multiprocessing.get_context("fork").Event(), multiprocessing.get_context("fork")

    def hang(_: str) -> None:
        begun.set()
        time.sleep(60)

    process = fork.Process(target=prepared, args=(config, tmp_path / "index", ALONE, hang))
    process.start()
    assert begun.wait(60)
    process.kill()
    process.join(60)
    (lock,) = (tmp_path / "index").glob("*.lock")
    start, said = time.monotonic(), []
    assert texts_of(str(prepared(config, tmp_path / "index", ALONE, said.append).data.path)) == STORIES
    assert time.monotonic() - start < at_start.PATIENCE / 2 and not lock.exists() and len(said) == 1


def test_who_waits_says_for_what(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(path=str(source), tokenizer="bytes", text_key="content")
    path = prepared(config, tmp_path / "index", ALONE, print).data.path
    os.rename(f"{path}.idx", tmp_path / "hidden")
    monkeypatch.setattr(at_start, "SAY_EVERY", 0.0)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        os.rename(tmp_path / "hidden", f"{path}.idx")

    assert prepared(config, tmp_path / "index", Place(1, 2, 1, 2), say).data.path == path
    assert said == [f"waiting for {path}, which another process prepares"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "0.jsonl, line 1: without the key (no 'text'; it has content, n); name the key that holds the text with "
             "data.text_key, or leave such text out with --on_error skip (an option of tools/prepare_data.py)"),
        ({"text_key": "content", "max_tokens": 2}, "data.max_tokens=2 is less than the first text takes"),
        ({"path": "nowhere"}, "source nowhere does not exist"),
        ({"tokenizer": "nothing"}, "tokenizer nothing does not exist"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_prepared_is_one_sentence(
    fields: dict[str, Any], sentence: str, source: Path, tmp_path: Path
) -> None:
    config = config_of(**{"path": str(source), "tokenizer": "bytes", **fields})
    with pytest.raises(DataError) as caught:
        prepared(config, tmp_path / "run/data_index", ALONE, print)
    assert sentence in str(caught.value)
    assert not list(tmp_path.rglob("*.idx")) and not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize(("name", "value"), [("max_tokens", 5), ("text_key", "content")])
@pytest.mark.parametrize("make", [lambda fields: fields, lambda fields: fields | {"path": "text.txt"}])
def test_fields_of_preparing_are_refused_where_nothing_is_prepared(
    name: str, value: Any, make: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    config = config_of(**make({name: value}))
    with pytest.raises(ConfigError, match=f"data.{name}={value} is of text that is prepared"):
        check_at_start(config, to_prepare(config))

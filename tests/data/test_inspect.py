"""The inspector: facts of whole data, one sentence for each kind of damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vqmoe_ds.data import inspect, prepare
from vqmoe_ds.data.index_files import HashedFile, write_index
from vqmoe_ds.data.tokenizers import load_tokenizer

TEXTS = ["short", "some longer text\nof two lines", "x" * 1000, *(f"document {i}" for i in range(20))]


@pytest.fixture
def prefix(tmp_path, capsys) -> Path:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]))
    arguments = [str(tmp_path / "t.jsonl"), "--output", str(tmp_path / "d")]
    assert prepare.main(prepare.build_parser("").parse_args(arguments)) == 0
    capsys.readouterr()
    return tmp_path / "d"


def run(capsys, prefix: Path, *options: str) -> tuple[int, str, str]:
    code = inspect.main(inspect.build_parser("").parse_args([str(prefix), *options]))
    return code, *capsys.readouterr()


def test_facts(prefix, capsys):
    code, out, _ = run(capsys, prefix, "--json", "--verify")
    found = json.loads(out)
    assert code == 0 and found["documents"] == found["sequences"] == 23
    assert found["tokens"] == sum(map(len, TEXTS)) + 23 and found["bytes"] == sum(map(len, TEXTS))
    assert found["first_documents"] == [TEXTS[0], TEXTS[1], "x" * 300 + "…"]
    lengths = [len(text) + 1 for text in TEXTS]
    for row in found["lengths"]:
        assert row["documents"] == sum(row["from"] <= n <= row["to"] for n in lengths)
    assert sum(row["documents"] for row in found["lengths"]) == 23 and found["longest_tokens"] == 1001
    assert found["checksum"] == "verified" and found["skipped"] == {"empty document": 1}
    assert found["tokenizer"]["kind"] == "bytes" and found["largest_id"] == 256


def test_text_for_people(prefix, capsys):
    code, out, _ = run(capsys, Path(f"{prefix}.idx"), "--documents", "2")
    assert code == 0 and "23 documents" in out and "some longer text\nof two lines" in out and "####" in out
    assert "left out: 1 x empty document (first: " in out and "not compared (--verify)" in out


def edit(path: str, change) -> None:
    data = bytearray(Path(path).read_bytes())
    change(data)
    Path(path).write_bytes(bytes(data))


def put(offset: int, value: int, dtype: type):
    """A change that overwrites one number."""
    raw = np.array([value], dtype).tobytes()
    return lambda data: data.__setitem__(slice(offset, offset + len(raw)), raw)


HEADER, COUNT = 34, 23
DAMAGE = {
    "truncated": ("bin", lambda data: data.__delitem__(slice(100, None)), "the .bin is truncated"),
    "id": ("bin", put(2 * 8, 300, np.uint16), "token 8 (document 1) has the id 300, beyond the tokenizer's vocabulary"),
    "past": ("idx", put(HEADER + 4 * 3, 9999, np.int32), "sequence 3 points past the end of the .bin"),
    "negative": ("idx", put(HEADER + 4 * 3, -1, np.int32), "sequence 3 points past the end of the .bin"),
    "shifted": ("idx", put(HEADER + 4 * COUNT + 8 * 3, 2, np.int64), "sequence 3 starts at a wrong byte"),
    "order": ("idx", put(HEADER + 12 * COUNT + 8 * 3, 22, np.int64), "its documents are out of order"),
    "magic": ("idx", put(0, 0, np.uint8), "is not an index of Megatron's IndexedDataset"),
    "description": ("json", lambda data: data.__delitem__(slice(20, None)), "d.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence_and_exit_code_2(name, prefix, capsys):
    suffix, change, message = DAMAGE[name]
    edit(f"{prefix}.{suffix}", change)
    code, out, err = run(capsys, prefix)
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_changes_that_only_checksums_see(prefix, capsys):
    edit(f"{prefix}.bin", put(0, 65, np.uint16))
    assert run(capsys, prefix)[0] == 0
    code, _, err = run(capsys, prefix, "--verify")
    assert code == 2 and "d.bin has changed since it was made (SHA-256 differs)" in err


def test_a_tokenizer_that_is_missing_or_another(prefix, tmp_path, capsys):
    shutil.rmtree(f"{prefix}.tokenizer")
    code, _, err = run(capsys, prefix)
    assert code == 2 and "d.tokenizer is missing; copy it" in err
    assert run(capsys, prefix, "--tokenizer", "bytes")[0] == 0
    (tmp_path / "vocab.txt").write_text("word\n")
    code, _, err = run(capsys, prefix, "--tokenizer", str(tmp_path / "vocab.txt"))
    assert code == 2 and "was made with another tokenizer than" in err


def test_description_of_another_preparation(prefix, capsys):
    about = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**about, "documents": 5}))
    code, _, err = run(capsys, prefix)
    assert code == 2 and "tells of 5 documents" in err and "not of one preparation" in err


def test_files_of_megatrons_own_tools(tmp_path, capsys):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"))
    tokenizer = load_tokenizer("bytes")
    for text in TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    found = json.loads(run(capsys, tmp_path / "m", "--json")[1])
    assert (
        found["tokenizer"] is None
        and found["documents"] == 23
        and found["first_documents"][0] == "115 104 111 114 116 256"
    )
    found = json.loads(run(capsys, tmp_path / "m", "--json", "--tokenizer", "bytes")[1])
    assert found["first_documents"][:2] == TEXTS[:2] and found["checksum"] == "none kept"
    code, _, err = run(capsys, tmp_path / "m", "--verify")
    assert code == 2 and "no checksum to --verify" in err


def write(prefix: Path, ids: list[int], lengths: list[int], ends: list[int]) -> None:
    np.array(ids, np.int32).tofile(f"{prefix}.bin")
    with HashedFile(f"{prefix}.idx") as file:
        chunk, end = np.array(lengths, np.int32), np.array(ends, np.int64)
        write_index(file, np.dtype(np.int32), len(chunk), len(end), lambda: [chunk], lambda: [end])


def test_documents_without_a_sequence_have_no_token(tmp_path, capsys):
    write(tmp_path / "d", [], [], [0, 0])
    found = json.loads(run(capsys, tmp_path / "d", "--json")[1])
    assert (found["documents"], found["tokens"], found["longest_tokens"]) == (2, 0, 0)
    assert found["lengths"] == [{"from": 0, "to": 0, "documents": 2}]


@pytest.mark.parametrize("options", [(), ("--tokenizer", "bytes")])
def test_an_id_below_zero_is_of_no_tokenizer(options, tmp_path, capsys):
    write(tmp_path / "d", [65, -7], [2], [1])
    code, _, err = run(capsys, tmp_path / "d", *options)
    assert code == 2 and "token 1 (document 0) has the id -7, which no tokenizer gives; it is damaged" in err

"""Labelled sets: every row with its class, the same numbers in every split, and nothing lost without a word."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqmoe_ds.data.labelled import open_labelled
from vqmoe_ds.runtime.errors import DataError


def _jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _folder(path: Path, **files: bytes | str) -> Path:
    """Files by name, with ``_`` for the dots."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name.replace("_", ".")).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_sst_files(tmp_path: Path) -> None:
    folder = _folder(
        tmp_path, train_txt="1 a stirring , funny film\n0 dull\n", dev_txt="0 no ... just no\n", test_txt="1 é !\n\n"
    )
    train, dev, test = (open_labelled(f"sst2={folder}", split) for split in ("train", "validation", "test"))
    assert train.texts == ["a stirring , funny film", "dull"] and train.labels.tolist() == [1, 0]
    assert train.labels.dtype == np.int64 and train.name == "sst2" and len(train) == 2
    assert train.classes == dev.classes == test.classes == ["negative", "positive"]
    assert dev.texts == ["no ... just no"] and test.texts == ["é !"] and train.skipped == {}
    five = open_labelled(f"sst5={_folder(tmp_path, train_txt='4 a' + chr(10) + '0 b' + chr(10))}")
    assert [five.classes[label] for label in five.labels] == ["very positive", "very negative"]


@pytest.mark.parametrize("end, row", [("txt", "{0} a\r{0} b"), ("jsonl", '{{"label": {0},\r"text": "a\\r{0} b"}}')])
def test_only_a_line_feed_ends_a_row(end: str, row: str, tmp_path: Path) -> None:
    (tmp_path / f"train.{end}").write_bytes("\r\n".join(map(row.format, (0, 1))).encode())
    assert open_labelled(str(tmp_path)).texts == ["a\r0 b", "a\r1 b"]


def test_banking_csv_has_texts_over_several_lines(tmp_path: Path) -> None:
    folder = _folder(
        tmp_path,
        train_csv='text,category\r\n"My card, it\r\nis ""lost""",lost_card\r\nOh?,Card_arrival\r\nHow?,lost_card\r\n',
        test_csv="text,category\nLost it,lost_card\n",
    )
    train, test = open_labelled(f"banking77={folder}"), open_labelled(f"banking77={folder}", "test")
    assert train.texts[0] == 'My card, it\r\nis "lost"'
    assert train.classes == test.classes == ["Card_arrival", "lost_card"]
    assert train.labels.tolist() == [1, 0, 1] and test.labels.tolist() == [1]


def test_imdb_parts_are_joined_and_all_of_them_needed(tmp_path: Path) -> None:
    for part in range(3):
        rows = [{"id": f"{part}_{i}", "label": i % 2, "text": f"film {part} {i}"} for i in range(4)]
        (tmp_path / f"train-{part}-of-3.jsonl.bz2").write_bytes(bz2.compress(_jsonl(*rows)))
    train = open_labelled(f"imdb={tmp_path}")
    assert train.texts == [f"film {part} {i}" for part in range(3) for i in range(4)]
    assert train.labels.tolist() == [0, 1] * 6
    (tmp_path / "train-1-of-3.jsonl.bz2").unlink()
    with pytest.raises(DataError, match="train split .* is not whole"):
        open_labelled(f"imdb={tmp_path}")
    with pytest.raises(DataError, match="no validation split .* hold out"):
        open_labelled(f"imdb={tmp_path}", "validation")


@pytest.mark.parametrize("pack, end", [(bytes, ""), (gzip.compress, ".gz"), (bz2.compress, ".bz2")])
def test_own_files(tmp_path: Path, pack: Callable[[bytes], bytes], end: str) -> None:
    contents = {
        "a.csv": "\ufeffstars,review,id\n10,good,1\n9,fair,2\n10,great,3\n".encode(),
        "a.tsv": b"review\tstars\ngood\t10\nfair\t9\ngreat\t10\n",
        "a.jsonl": _jsonl(
            {"review": "good", "stars": 10}, {"review": "fair", "stars": "9"}, {"review": "great", "stars": 10.0}
        ),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}{end}"
        path.write_bytes(pack(content))
        found = open_labelled(str(path), text_key="review", label_key="stars")
        assert found.texts == ["good", "fair", "great"]
        assert found.classes == ["9", "10"] and found.labels.tolist() == [1, 0, 1]  # by value, not by spelling
        assert open_labelled(f"mine={path}", text_key="review", label_key="stars").name == "mine"


def test_one_file_takes_the_classes_of_its_training_set(tmp_path: Path) -> None:
    folder = _folder(tmp_path, train_csv="text,label\na,x\nb,y\n", other_csv="text,label\nc,y\n")
    train = open_labelled(str(folder / "train.csv"))
    with pytest.raises(DataError, match="pass the classes of its training set"):
        open_labelled(str(folder / "other.csv"), "test")
    assert open_labelled(str(folder / "other.csv"), "test", classes=train.classes).labels.tolist() == [1]


BAD_ROWS = [
    ("train_csv", b"text,label\ngood,a\n  ,b\nfine,b\n", "line 3: empty text"),
    ("train_csv", b"text,label\ngood,a\nso so,\nfine,b\n", "line 3: no label"),
    ("train_csv", b"text,label\ngood,a\nb\xffd,b\nfine,b\n", "line 3: not UTF-8"),
    ("train_csv", b"text,label\ngood,a\none, two,b\nfine,b\n", "line 3: broken row: 3 columns"),
    ("train_csv", b'text,label\ngood,a\n"x" y,b\nfine,b\n', "line 3: broken row"),
    (
        "train_jsonl",
        _jsonl({"text": "good", "label": "a"}, {"text": "x"}, {"text": "fine", "label": "b"}),
        "line 2: without the key: 'label'",
    ),
    (
        "train_jsonl",
        _jsonl({"text": "good", "label": "a"}, ["x"], {"text": "fine", "label": "b"}),
        "line 2: without the key: 'text'",
    ),
    (
        "train_jsonl",
        _jsonl({"text": "good", "label": "a"}, {"text": 3, "label": "b"}, {"text": "fine", "label": "b"}),
        "line 2: not a string",
    ),
    (
        "train_jsonl",
        _jsonl({"text": "good", "label": "a"}, {"text": "\ud800", "label": "b"}, {"text": "fine", "label": "b"}),
        "line 2: half of a surrogate pair",
    ),
    (
        "train_jsonl",
        _jsonl({"text": "good", "label": "a"}, {"text": "x", "label": None}, {"text": "fine", "label": "b"}),
        "line 2: no label",
    ),
    (
        "train_jsonl",
        b'{"text": "good", "label": "a"}\n{"text": \n{"text": "fine", "label": "b"}\n',
        "line 2: broken row",
    ),
    ("train_txt", b"a good\nb\nb fine\n", "line 2: empty text"),
]


@pytest.mark.parametrize("name, content, problem", BAD_ROWS, ids=[f"{row[0]}-{row[2]}" for row in BAD_ROWS])
def test_bad_rows_are_refused_or_counted(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    folder = _folder(tmp_path, **{name: content})
    with pytest.raises(DataError, match=problem):
        open_labelled(str(folder))
    kept = open_labelled(str(folder), on_error="skip")
    assert kept.texts == ["good", "fine"] and kept.labels.tolist() == [0, 1]
    assert kept.skipped == {problem.split(": ")[1].split(":")[0]: 1}


def test_labels_never_seen_in_training(tmp_path: Path) -> None:
    folder = _folder(tmp_path, train_csv="text,label\na,x\nb,y\n", test_csv="text,label\nc,y\nd,z\ne,1\n")
    with pytest.raises(DataError, match="test.csv, line 3: label never seen in training: 'z'"):
        open_labelled(str(folder), "test")
    test = open_labelled(str(folder), "test", on_error="skip")
    assert test.texts == ["c"] and test.labels.tolist() == [1]
    assert test.skipped == {"label never seen in training": 2}  # the number of a class is not its name
    with pytest.raises(DataError, match="'2'"):
        open_labelled(f"sst2={_folder(tmp_path / 'sst', train_txt='2 what')}")


def test_damaged_archives(tmp_path: Path) -> None:
    rows = [{"text": f"text {i} " + str(hash(i * 7919)) * 5, "label": str(i % 2)} for i in range(5000)]
    for end, packed in ((".gz", gzip.compress(_jsonl(*rows))), (".bz2", bz2.compress(_jsonl(*rows), 1))):
        path = tmp_path / f"train.jsonl{end}"
        for broken in (packed[: len(packed) * 3 // 4], b"no archive"):
            path.write_bytes(broken)
            with pytest.raises(DataError, match="damaged file: it is cut|is not (gzip|bzip2) data"):
                open_labelled(str(path))
        path.write_bytes(packed[: len(packed) * 3 // 4])
        kept = open_labelled(str(path), on_error="skip")
        assert 0 < len(kept) < 5000 and kept.skipped["damaged file"] == 1


def test_unusable_files(tmp_path: Path) -> None:
    def refused(problem: str, spec: object = tmp_path / "train.csv", **options: Any) -> None:
        with pytest.raises(DataError, match=problem):
            open_labelled(str(spec), **options)

    refused("does not exist; known names are sst2, sst5", spec="nowhere")
    refused("does not exist", spec=f"sst2={tmp_path}/nowhere")
    _folder(tmp_path, train_csv="text,label\na,x\nb,y\n")
    refused("no column 'stars', only text, label", label_key="stars")
    refused("no column 'body'", text_key="body", on_error="skip")
    _folder(tmp_path, train_csv="")
    refused("no column 'text', only nothing")
    _folder(tmp_path, train_csv="text,label\n")
    refused("has no rows")
    _folder(tmp_path, train_csv="text,label\n,x\n")
    refused("has no rows, 1 rows left out .empty text.", on_error="skip")
    _folder(tmp_path, train_csv="text,label\na,x\nb,x\n")
    refused("only the class 'x'")
    _folder(tmp_path, train_csv='text,label\na,x\n"b,x\nc,y\nd,y\n')
    refused("line 3: a quotation mark that is never closed", on_error="skip")
    (tmp_path / "train.jsonl").write_bytes(_jsonl({"text": "a", "label": "x"}))
    refused("there twice", spec=tmp_path)
    (tmp_path / "notes.pdf").write_bytes(b"")
    refused("neither CSV, TSV", spec=tmp_path / "notes.pdf")


def test_hub_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as the hub's data sets have them; the hub itself is not reached."""
    import datasets

    rows = {
        "SetFit/sst2": [
            {"text": "good", "label": 1, "label_text": "positive"},
            {"text": "bad", "label": 0, "label_text": "negative"},
        ],
        "mteb/banking77": [
            {"text": "Where?", "label": 11, "label_text": "card_arrival"},
            {"text": "How?", "label": 0, "label_text": "activate_my_card"},
        ],
    }

    def load(path: str, split: str, cache_dir: str | None) -> list[dict[str, Any]]:
        if path not in rows:
            raise Exception(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)")
        return rows[path]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_labelled("sst2", "test").labels.tolist() == [1, 0]
    banking = open_labelled("banking77", "validation")
    assert banking.classes == ["activate_my_card", "card_arrival"] and banking.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="train split of hub:stanfordnlp/imdb cannot be loaded .Exception: Couldn't"):
        open_labelled("imdb")


AG_NEWS = '"3","Wall St. Bears, again","Short-sellers; are seeing green."\n"4","Science","Rockets"\n"3","","Oil"\n'


@pytest.mark.parametrize(
    "name, content, text_key, label_key",
    [
        ("train_csv", AG_NEWS, "1,2", "0"),
        ("train_csv", AG_NEWS.replace('","', '"\t"'), "1,2", "0"),
        ("train_tsv", AG_NEWS.replace('","', '"\t"'), "1, 2", "0"),
        ("train_csv", "label;title;body\n" + AG_NEWS.replace('","', '";"'), "title,body", "label"),
        ("train_csv", "label\ttitle\tbody\n" + AG_NEWS.replace('","', '"\t"'), "title,body", "label"),
        ("train_csv", "0,1,2\n" + AG_NEWS, "1,2", "0"),  # a header of numbers
    ],
)
def test_tables_as_they_are_published(name: str, content: str, text_key: str, label_key: str, tmp_path: Path) -> None:
    found = open_labelled(str(_folder(tmp_path, **{name: content})), text_key=text_key, label_key=label_key)
    assert found.texts == ["Wall St. Bears, again\nShort-sellers; are seeing green.", "Science\nRockets", "Oil"]
    assert found.classes == ["3", "4"] and found.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
def test_another_encoding_is_named(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"train.{kind}").write_bytes("text,label\na,0\nb,1\n".encode("utf-16"))
    with pytest.raises(DataError, match=rf"train\.{kind} is UTF-16; write it as UTF-8"):
        open_labelled(str(tmp_path))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,text,label\na,b,0\nc,d,1\n")
    with pytest.raises(DataError, match="has 2 columns 'text'; give each a name of its own"):
        open_labelled(str(tmp_path))


def test_several_keys_and_names_with_commas(tmp_path: Path) -> None:
    rows = _jsonl({"a": "x", "b": None, "l": "p"}, {"a": "y", "b": "z", "l": "q"})
    folder = _folder(tmp_path, train_jsonl=rows, test_jsonl=_jsonl({"a": "x", "b": 3, "l": "p"}))
    assert open_labelled(str(folder), text_key="a,b", label_key="l").texts == ["x", "y\nz"]
    with pytest.raises(DataError, match="line 1: not a string"):
        open_labelled(str(folder), "test", text_key="a,b", label_key="l")
    with pytest.raises(DataError, match="line 1: without the key: 'c'"):
        open_labelled(str(folder), text_key="a,c", label_key="l")
    _folder(tmp_path / "other", train_csv='"title,text",label\nx,p\ny,q\n')
    assert open_labelled(str(tmp_path / "other"), text_key="title,text").texts == ["x", "y"]


def test_coarse_labels_by_choice(tmp_path: Path) -> None:
    lines = "DESC:manner How did it\nENTY:cremat What films\nDESC:def What is\n"
    trec = _folder(tmp_path, train_txt=lines)
    assert open_labelled(str(trec)).classes == ["DESC:def", "DESC:manner", "ENTY:cremat"]
    coarse = open_labelled(str(trec), label_key="label:coarse")
    assert coarse.classes == ["DESC", "ENTY"] and coarse.labels.tolist() == [0, 1, 0]
    table = _folder(tmp_path / "t", train_csv="A:x,one\nB:y,two\nA:z,three\n")
    assert open_labelled(str(table), text_key="1", label_key="0:coarse").classes == ["A", "B"]


def test_a_table_without_header_is_told_from_one_with_other_names(tmp_path: Path) -> None:
    folder = _folder(tmp_path, train_csv=AG_NEWS)
    with pytest.raises(DataError, match=r"no column 'text', only 3, Wall St.*by numbers .0, 1, .* first line is data"):
        open_labelled(str(folder))
    with pytest.raises(DataError, match="no column '7', only 3"):
        open_labelled(str(folder), text_key="7", label_key="0")
    _folder(tmp_path, train_csv=AG_NEWS + "4,short\n")
    with pytest.raises(DataError, match="line 4: broken row: 2 columns where the first line has 3"):
        open_labelled(str(folder), text_key="1,2", label_key="0")

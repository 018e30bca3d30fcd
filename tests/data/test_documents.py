"""Sources: every document of every kind of file, in order, whatever the cuts; nothing lost without being counted."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import re
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqmoe_ds.data import json_lines
from vqmoe_ds.data.documents import plan_units, read_unit
from vqmoe_ds.data.units import PIECE_BYTES, Skips, SourceOptions
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.terminal import print_records


def documents(*sources: Path | str, skips: Skips | None = None, **options) -> list[str]:
    """All documents, their pieces joined; checks what holds for every piece."""
    found, text = [], ""
    for unit in plan_units(map(str, sources), SourceOptions(**options)):
        for piece in read_unit(unit, skips):
            assert len(piece.text.encode()) <= PIECE_BYTES
            text += piece.text
            if piece.ends_document:
                found.append(text)
                text = ""
    assert text == "", "the last document did not end"
    return found


def big_text(size: int, seed: int = 0) -> str:
    """Paragraphs of lines of words, some long, with symbols of one to four bytes."""
    rng = random.Random(seed)
    words = ["a", "word", "naïve", "漢字", "😀", "x" * 300]
    out: list[str] = []
    while len("".join(out)) < size:
        out += [rng.choice(words) + rng.choice("    \n") + rng.choice(["", "", "", "", "\n\n"]) for _ in range(5000)]
    return "".join(out).strip() + "\n"


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> tuple[Path, str]:
    """A file of several units."""
    text = big_text(3_000_000)
    path = tmp_path_factory.mktemp("big") / "big.txt"
    path.write_bytes(text.encode())
    assert len(plan_units([str(path)], SourceOptions())) > 3
    return path, text


def test_a_file_is_one_document_whatever_its_size(big):
    path, text = big
    assert documents(path) == [text]


def test_lines_and_paragraphs_do_not_depend_on_cuts(big):
    path, text = big
    assert documents(path, document="line") == [line for line in text.split("\n") if line.strip()]
    paragraphs = [part.strip("\n") for part in re.split(r"\n(?:[ \t]*\n)+", text)]
    assert [d.strip("\n") for d in documents(path, document="paragraph")] == [p for p in paragraphs if p.strip()]


@pytest.mark.parametrize("symbol", ["a", "é", "漢", "😀", "ab cd "])
def test_text_without_line_breaks_is_cut_between_words_or_characters(tmp_path, symbol):
    text = symbol * (2_500_000 // len(symbol.encode()))
    (tmp_path / "one.txt").write_text(text)
    for document in ("file", "line", "paragraph"):
        assert documents(tmp_path / "one.txt", document=document) == [text]


def test_windows_line_ends_and_byte_order_marks(tmp_path):
    (tmp_path / "w.txt").write_bytes("\ufeffone\r\ntwo\r\n\r\n \r\nthree\r\n".encode())
    assert documents(tmp_path / "w.txt") == ["one\r\ntwo\r\n\r\n \r\nthree\r\n"]
    assert documents(tmp_path / "w.txt", document="paragraph") == ["one\r\ntwo", "three"]
    assert documents(tmp_path / "w.txt", document="line") == ["one", "two", "three"]


def test_compressed_files_hold_what_plain_ones_do(tmp_path):
    lines = "".join(json.dumps({"text": f"document {i} ü"}) + "\n" for i in range(3000))
    raw = lines.encode()
    zst = pa.compress(raw[:50_000], codec="zstd", asbytes=True) + pa.compress(raw[50_000:], codec="zstd", asbytes=True)
    packed = {"gz": gzip.compress(raw), "bz2": bz2.compress(raw), "xz": lzma.compress(raw), "zst": zst}
    for ending, data in packed.items():
        (tmp_path / f"d.jsonl.{ending}").write_bytes(data)
        (tmp_path / f"t.txt.{ending}").write_bytes(data)
        assert documents(tmp_path / f"d.jsonl.{ending}") == [f"document {i} ü" for i in range(3000)]
        assert documents(tmp_path / f"t.txt.{ending}") == [lines]


def test_json_lines_span_units_and_long_texts_are_cut(tmp_path):
    texts = [f"{i} " + "long line\n" * (9000 if i % 100 == 0 else i % 7 + 1) for i in range(1500)]
    (tmp_path / "d.jsonl").write_text("\n\n".join(json.dumps({"body": t, "n": 1}) for t in texts))
    assert len(plan_units([str(tmp_path / "d.jsonl")], SourceOptions())) == 2
    assert documents(tmp_path / "d.jsonl", text_key="body") == texts


def test_parquet_row_groups(tmp_path):
    texts = [f"row {i} " + "x" * 2000 for i in range(2000)]
    pq.write_table(
        pa.table({"id": list(range(2000)), "text": texts}),
        tmp_path / "t.parquet",
        row_group_size=100,
        compression="none",
        use_dictionary=False,
    )
    assert len(plan_units([str(tmp_path / "t.parquet")], SourceOptions())) > 2
    assert documents(tmp_path / "t.parquet") == texts


def test_folders_and_globs_in_the_order_of_paths_small_files_share_a_unit(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c/k.txt", ".hidden", ".git/config", "c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a/c/k.txt", "a/z.txt", "b.txt", "c.md"]
    assert documents(tmp_path / "**/*.txt", tmp_path / "c.md") == ["a/c/k.txt", "a/z.txt", "b.txt", "c.md"]
    assert len(plan_units([str(tmp_path)], SourceOptions())) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_whatever_datasets_loads(tmp_path, streaming, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    for part in range(2):
        lines = (json.dumps({"text": f"{part} {i}"}) for i in range(1500))
        (tmp_path / f"set/train-{part}.jsonl").write_text("\n".join(lines))
    found = documents(f"hub:{tmp_path / 'set'}", streaming=streaming, cache_dir=str(tmp_path / "cache"))
    assert found == [f"{part} {i}" for part in range(2) for i in range(1500)]
    with pytest.raises(DataError, match=r"hub:.*:train.* no column 'body'; name one of text with --text_key"):
        documents(f"hub:{tmp_path / 'set'}::train", text_key="body", cache_dir=str(tmp_path / "cache"))
    assert documents(f"hf:{tmp_path / 'set'}:train", cache_dir=str(tmp_path / "cache")) == documents(
        f"hub:{tmp_path / 'set'}::train", cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(DataError, match=r"hub:/nowhere cannot be loaded .*check name, configuration and split"):
        documents("hub:/nowhere")


def bad_files(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Damage of every kind: file -> (the refusal, documents that are left with skip)."""
    good, bad = '{"text": "good"}\n', b'{"text": "b\xffd"}\n'
    whole = gzip.compress("".join(f"line {i * i}\n" for i in range(50_000)).encode())
    content: dict[str, tuple[bytes, str, list[str]]] = {
        "latin.txt": (
            b"one\ntw\xf6\nthree\n",
            r"latin.txt, line 2: not UTF-8 \(byte 0xf6\); convert",
            ["one\nthree\n"],
        ),
        "utf.jsonl": (good.encode() + bad, r"utf.jsonl, line 2: not UTF-8", ["good"]),
        "key.jsonl": (
            b'{"body": "x"}\n' + good.encode(),
            r"key.jsonl, line 1: without the key .*it has body",
            ["good"],
        ),
        "not.jsonl": ((good + "{oops\n" + good).encode(), r"not.jsonl, line 2: not a JSON object", ["good"] * 2),
        "list.jsonl": ((good + "[1]\n").encode(), r"list.jsonl, line 2: not a JSON object \(it is a list", ["good"]),
        "null.jsonl": ((good + '{"text": null}\n').encode(), r"line 2: not a string \(it is null\); make", ["good"]),
        "half.jsonl": (
            (good + '{"text": "\\ud800"}\n').encode(),
            r"half.jsonl, line 2: half of a surrogate pair; write",
            ["good"],
        ),
        "cut.txt.gz": (whole[: len(whole) // 2], r"cut.txt.gz: damaged file .*fetch it again", ["line 0\n"]),
        "not.jsonl.gz": (b"text", r"not.jsonl.gz is not gzip data, as its name says; fetch it again, or take", []),
        "not.parquet": (b"text", r"not.parquet: damaged file", []),
    }
    for name, (data, _, _) in content.items():
        (folder / name).write_bytes(data)
    pq.write_table(pa.table({"body": ["x"]}), folder / "column.parquet")
    pq.write_table(pa.table({"text": ["good", None, "good"]}), folder / "null.parquet")
    return {name: (refusal, left) for name, (_, refusal, left) in content.items()} | {
        "column.parquet": (r"column.parquet: without the column .*it has body\); name the column", []),
        "null.parquet": (r"null.parquet, row 2: not a string", ["good", "good"]),
    }


def test_bad_input_is_refused_with_its_place_or_counted(tmp_path):
    for name, (refusal, left) in bad_files(tmp_path).items():
        with pytest.raises(DataError, match=refusal) as caught:
            documents(tmp_path / name)
        assert str(caught.value).endswith("or leave such text out with --on_error skip")
        skips = Skips("skip")
        found = documents(tmp_path / name, on_error="skip", skips=skips)
        assert [text[: len(want)] for text, want in zip(found, left, strict=True)] == left, name
        assert list(skips.counts.values()) == [1], name
        assert name in str(next(iter(skips.first.values())))


def test_bad_lines_of_a_large_file_are_found_in_any_unit(big, tmp_path):
    _, text = big
    lines = text.encode().split(b"\n")
    bad = {1000, len(lines) // 2, len(lines) - 3}
    (tmp_path / "bad.txt").write_bytes(b"\n".join(b"\xff" if i in bad else line for i, line in enumerate(lines)))
    skips = Skips("skip")
    (found,) = documents(tmp_path / "bad.txt", on_error="skip", skips=skips)
    assert found == "\n".join(line for i, line in enumerate(text.split("\n")) if i not in bad)
    assert skips.counts == {"not UTF-8": 3}
    assert str(skips.first["not UTF-8"]) == f"{tmp_path / 'bad.txt'}, line 1001"


def test_empty_documents_hold_nothing_to_lose_and_are_only_counted(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n\n")
    (tmp_path / "c.jsonl").write_text('{"text": " "}\n{"text": "full"}\n')
    skips = Skips("fail")
    assert documents(tmp_path, skips=skips) == ["full"]
    assert skips.counts == {"empty document": 3}


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    for source, message in {
        "nothing": "nothing does not exist; give files, folders, globs",
        "*.none": "does not exist",
        "empty": "empty holds no files",
        "a.zip": "is an archive of files; unpack it",
    }.items():
        with pytest.raises(DataError, match=message):
            plan_units([str(tmp_path / source)], SourceOptions())
    with pytest.raises(DataError, match="no recipe 'none'"):
        plan_units(["recipe:none"], SourceOptions(cache_dir=str(tmp_path)))


def test_plans_depend_on_the_sources_alone(big):
    path, _ = big
    options = SourceOptions(document="line")
    first, second = (plan_units([str(path)], options) for _ in range(2))
    assert first == second
    assert sum(unit.size for unit in first) == path.stat().st_size
    assert len({unit.fingerprint() for unit in first}) == len(first)
    other = plan_units([str(path)], SourceOptions(document="file"))
    assert not {u.fingerprint() for u in first} & {u.fingerprint() for u in other}
    path.touch()
    assert not {u.fingerprint() for u in first} & {u.fingerprint() for u in plan_units([str(path)], options)}


# ---------------------------------------------------------------- folders and files as they may be


def test_patterns_reach_any_depth_and_follow_no_links_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``glob`` ends after some hundred levels, and does not end where folders link to themselves twice."""
    top = tmp_path / "top"
    top.mkdir()
    monkeypatch.chdir(top)
    for name in ("one", "two"):
        os.symlink(".", name)
    Path("a.txt").write_text("a")
    Path(".hidden.txt").write_text("no")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("b.txt").write_text("b")
    Path("b.md").write_text("c")
    os.chdir(top)

    def found(pattern: str) -> str:
        return "".join(piece.text for unit in plan_units([pattern], SourceOptions()) for piece in read_unit(unit))

    try:
        assert found("**/*.txt") == found(f"{top}/**/*.txt") == found("**/**/*.txt") == found("**/**/**/*.txt") == "ab"
        assert found("d/**/**") == "cb"
        assert found("d/**/b.*") == "cb" and found("**") == "acb" and found("*.txt") == "a"
        assert found("**/.hid*") == "no" and found("d/**") == "cb"
        with pytest.raises(DataError, match="does not exist"):
            found("**/*.none")
    finally:
        subprocess.run(["rm", "-rf", str(top / "d")], check=True)


def test_a_folder_of_ten_thousand_files(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:02d}").mkdir()
    for number in range(10_000):
        os.close(os.open(tmp_path / f"{number % 100:02d}" / f"{number}.txt", os.O_CREAT | os.O_WRONLY))
    (tmp_path / "00" / "x.txt").write_text("one text")
    skips = Skips()
    units = plan_units([str(tmp_path)], SourceOptions())
    assert [piece.text for unit in units for piece in read_unit(unit, skips)] == ["one text"]
    assert skips.counts == {"empty document": 10_000}


def test_what_is_no_file_is_passed_over_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    print_records()
    (unit,) = plan_units([str(tmp_path)], SourceOptions())
    assert [piece.text for piece in read_unit(unit)] == ["text"]
    assert "passed over 2 that are no files" in capsys.readouterr().err
    for name in ("pipe.txt", "zero.txt"):
        with pytest.raises(DataError, match=f"{name} cannot be read .it is a (FIFO|device), not a regular file"):
            plan_units([str(tmp_path / name)], SourceOptions())
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="a.txt: damaged file .it is a FIFO"):
        list(read_unit(unit))
    with pytest.raises(DataError, match="does not exist"):
        plan_units(["x" * 5000], SourceOptions())


def test_a_json_line_has_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONGEST_JSON", 3 << 20)
    long = json.dumps({"text": "x" * (4 << 20)})
    for name, end in (("a.jsonl", "\n"), ("b.jsonl", "")):
        path = tmp_path / name
        path.write_text(json.dumps({"text": "before"}) + "\n" + long + end)
        if end:
            path.write_text(path.read_text() + json.dumps({"text": "after"}))
        units = plan_units([str(path)], SourceOptions(on_error="skip"))
        skips = Skips("skip")
        texts = [piece.text for unit in units for piece in read_unit(unit, skips)]
        assert texts == ["before", *(["after"] if end else [])] and list(skips.counts.values()) == [1]
        with pytest.raises(DataError, match=rf"{name}, line 2: a line of more than .* MiB; give one JSON object"):
            [list(read_unit(unit)) for unit in plan_units([str(path)], SourceOptions())]


def test_json_that_python_would_not_read(tmp_path):
    """A number of any length is one; what is nested too deeply is JSON, and called so."""
    (tmp_path / "n.jsonl").write_text('{"id": ' + "9" * 5000 + ', "text": "good"}\n{"text": ' + "9" * 5000 + "}\n")
    skips = Skips("skip")
    assert documents(tmp_path / "n.jsonl", on_error="skip", skips=skips) == ["good"]
    assert skips.counts == {"not a string": 1}
    (tmp_path / "d.jsonl").write_text('{"text": "good", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match="line 1: JSON nested too deeply; take out what is nested"):
        documents(tmp_path / "d.jsonl")

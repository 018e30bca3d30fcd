"""Training tokenizers: lossless, the same every time, on a sample of the whole corpus; bad requests get a sentence."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vqmoe_ds.data import tokenizer_training
from vqmoe_ds.data.documents import plan_units, read_unit
from vqmoe_ds.data.tokenizer_training import check_output, sample_pieces, split_sample, train_tokenizer
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.data.units import Piece, Skips, SourceOptions, Unit
from vqmoe_ds.runtime.errors import DataError

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files of 300 kB; every line tells its file."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 8))) for _ in range(3000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    for number in range(8):
        lines, size = [], 0
        while size < 300_000:
            lines.append(f"file{number}\t" + " ".join(draw.choices(words, weights, k=12)) + "  é.")
            size += len(lines[-1]) + 1
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("kind", ("unigram", "bpe"))
def test_trained_models_are_lossless_and_better_than_bytes(corpus: Path, kind: str) -> None:
    trained = train_tokenizer([str(corpus)], kind, 700, sample_mb=0.5)
    tokenizer = trained.tokenizer
    assert tokenizer.kind == "sentencepiece" and tokenizer.vocab_size == 700
    assert trained.bytes_per_token > 2 and trained.unknown == 0
    assert trained.held_out_bytes > 0 and 400_000 < trained.sample_bytes + trained.held_out_bytes <= 500_000
    for text in ("  a\n\n\tb \u2581 日本\x00\r\n", (corpus / "3.txt").read_text()[:5000], ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    newline, tab = tokenizer.encode("\n"), tokenizer.encode("\t")
    assert len(newline) == len(tab) == 1  # symbols of their own, not bytes


def test_word_vocabulary_is_the_most_frequent_words(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("b b b c c a a d <unk> <unk> <unk>\n" * 3)
    tokenizer = train_tokenizer([str(tmp_path / "a.txt")], "word", 6, sample_mb=0).tokenizer
    assert tokenizer.decode(tokenizer.encode("b a c d\n")) == " b a c <unk> \n"
    assert tokenizer.decode(range(tokenizer.vocab_size)) == " <unk> \n b a c"
    assert train_tokenizer([str(corpus)], "word", 500).unknown > 0


@pytest.mark.parametrize("kind", ("unigram", "bpe", "word"))
def test_the_same_input_gives_the_same_tokenizer(corpus: Path, kind: str) -> None:
    def checksum(seed: int) -> str:
        return train_tokenizer([str(corpus)], kind, 600, sample_mb=0.3, seed=seed).tokenizer.checksum

    assert checksum(0) == checksum(0) != checksum(1)


def test_sample_is_bounded_and_spread_over_the_corpus(corpus: Path) -> None:
    units = plan_units([str(corpus)], SourceOptions())
    sample = sample_pieces(units, 800_000, seed=0)
    assert 600_000 < sum(len(text.encode()) for text in sample) <= 800_000
    files = [text.split("file")[1][0] for text in sample]
    assert files == sorted(files) and len(set(files)) >= 5
    assert sum(map(len, sample_pieces(units, 9_000, seed=0))) > 800  # however little is wanted
    whole = "".join(sample_pieces(units, 0, seed=0))
    assert whole == "".join((corpus / f"{number}.txt").read_text() for number in range(8))


def test_of_a_large_corpus_only_a_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("text " * 200_000)
    units = plan_units([str(tmp_path)], SourceOptions())
    read: list[int] = []

    def counted(unit: Unit, skips: Skips | None) -> Iterator[Piece]:
        read.extend(int(Path(span.path).stem) for span in unit.spans)
        return read_unit(unit, skips)

    monkeypatch.setattr(tokenizer_training, "read_unit", counted)
    assert sum(map(len, sample_pieces(units, 1_000_000, seed=0))) <= 1_000_000
    assert len(read) <= 10 and min(read) < 8 and max(read) >= 32


def test_a_large_unit_among_small_ones_is_read(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("small " * 40_000)
    with gzip.open(tmp_path / "99.txt.gz", "wt") as stream:  # stays whole
        stream.write("".join(map(chr, random.Random(0).choices(range(0x400, 0x500), k=1_500_000))))
    sample = sample_pieces(plan_units([str(tmp_path)], SourceOptions()), 200_000, seed=0)
    assert any("small" not in text for text in sample)


def test_long_lines_are_cut_between_words(tmp_path: Path) -> None:
    (tmp_path / "one-line.txt").write_text("abc defgh " * 20_000)
    tokenizer = train_tokenizer([str(tmp_path)], "word", 5).tokenizer
    assert tokenizer.decode(range(5)) == " <unk> \n abc defgh"
    with pytest.raises(DataError, match="has 2 words"):
        train_tokenizer([str(tmp_path)], "word", 6)


def test_held_out_text_is_not_trained_on() -> None:
    pieces = [str(number) for number in range(45)]
    training, held_out = split_sample(pieces)
    assert held_out == ["19", "39"] and sorted([*training, *held_out], key=int) == pieces
    assert split_sample(["a"] * 19) == (["a"] * 19, [])


@pytest.mark.parametrize("kind", ("unigram", "bpe", "word"))
def test_a_vocabulary_too_large_for_the_sample_gets_the_largest_possible(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "small.txt"
    path.write_text("a small text with a few words in it\n" * 3)
    with pytest.raises(DataError, match="give [0-9]+ or less, or a larger sample") as error:
        train_tokenizer([str(path)], kind, 5000)
    possible = int(str(error.value).split("give ")[1].split(" ")[0])
    assert train_tokenizer([str(path)], kind, possible).tokenizer.vocab_size == possible


def test_impossible_requests_are_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    requests = [
        ([str(corpus)], "unigram", 100, "too small: the 256 bytes"),
        ([str(corpus)], "wordpiece", 1000, "no tokenizer kind 'wordpiece'"),
        ([str(corpus)], "bpe", 0, "must lie between 4 and"),
        ([str(tmp_path / "blank.txt")], "bpe", 1000, "no text"),
        ([str(tmp_path / "nothing.txt")], "bpe", 1000, "does not exist|nothing.txt"),
    ]
    for sources, kind, size, problem in requests:
        with pytest.raises(DataError, match=problem):
            train_tokenizer(sources, kind, size)


def test_unreadable_text_is_refused_or_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a b c"}\n{"body": "d"}\n{"text": "a \xff"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match="a.jsonl, (line|row) 2"):
        train_tokenizer([str(tmp_path)], "word", 6)
    trained = train_tokenizer([str(tmp_path)], "word", 6, options=SourceOptions(on_error="skip"))
    assert sum(trained.skipped.values()) == 2 and "left out" in trained.report()


def test_output_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    for name, problem in (("file", "is a file"), ("full", "other things"), ("file/below", "cannot be written")):
        with pytest.raises(DataError, match=problem):
            check_output(tmp_path / name)
    assert check_output(tmp_path / "new" / "x.tokenizer") == tmp_path / "new" / "x.tokenizer"


def _tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_command_line(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x.tokenizer"
    done = _tool(corpus, "--kind", "bpe", "--vocab_size", 400, "--sample_mb", 0.3, "--output", folder)
    assert done.returncode == 0, done.stderr
    assert "vocabulary 400" in done.stdout and "bytes per token" in done.stdout
    assert load_tokenizer(folder).vocab_size == 400
    done = _tool(corpus, "--vocab_size", 100, "--output", folder)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert load_tokenizer(folder).vocab_size == 400

"""Preparation as its users run it: real processes, real ranks, real damage."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from vqmoe_ds.data.documents import plan_units
from vqmoe_ds.data.index_files import check_prefix
from vqmoe_ds.data.prepare import Progress, build_parser, main, prepare
from vqmoe_ds.data.spread import deal
from vqmoe_ds.data.units import SourceOptions
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
PREPARE = [sys.executable, str(ROOT / "tools/prepare_data.py")]
MPIRUN = Path(sys.executable).parent / "mpirun"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
needs_mpi = pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this python")


def run(*arguments: object, ranks: int = 0, **kwargs) -> subprocess.CompletedProcess[str]:
    launcher = [str(MPIRUN), "-n", str(ranks), "--oversubscribe"] if ranks else []
    command = [*launcher, *PREPARE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **kwargs)


def digests(prefix: Path) -> list[str]:
    return [sha256_of(f"{prefix}.{name}") for name in ("bin", "idx", "json")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Seven units: a text of many pieces over three units, JSON lines, and a few empty or small documents."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "a.txt").write_text("".join(f"line {i} of {i * i % 97} words, naïve ones too\n" for i in range(60_000)))
    rows = ({"text": f"document {i} " + "word " * (i % 200)} for i in range(6000))
    (folder / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + '\n{"text": ""}\n')
    (folder / "c.txt").write_text("the end")
    assert len(plan_units([str(folder)], SourceOptions())) == 7
    return folder


@pytest.fixture(scope="module")
def alone(sources, tmp_path_factory) -> Path:
    """What one process makes of them."""
    prefix = tmp_path_factory.mktemp("alone") / "data"
    result = run(sources, "--output", prefix)
    assert result.returncode == 0, result.stderr
    assert "6,002 documents" in result.stdout and "left out: 1 x empty document (first:" in result.stdout
    return prefix


def test_megatron_reads_it_and_its_builder_makes_the_same_bytes(sources, alone, tmp_path):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    from vqmoe_ds.data.documents import read_unit

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=DType.optimal_dtype(257))
    ids: list[int] = []
    lengths: list[int] = []
    for unit in plan_units([str(sources)], SourceOptions()):
        for text, ends in read_unit(unit):
            lengths.append(len(text.encode()) + ends)
            ids += [*text.encode(), *([256] if ends else [])]
            if ends:
                builder.add_document(np.array(ids), lengths)
                ids, lengths = [], []
    builder.finalize(str(tmp_path / "m.idx"))
    assert [sha256_of(f"{alone}.{n}") for n in ("bin", "idx")] == [
        sha256_of(tmp_path / f"m.{n}") for n in ("bin", "idx")
    ]
    data = IndexedDataset(str(alone))
    first = np.concatenate(data[: int(data.document_indices[1])])
    assert bytes(first[:-1].astype(np.uint8)).decode() == (sources / "a.txt").read_text() and first[-1] == 256
    assert data.sequence_lengths.max() <= (64 << 10) + 1


def test_description_counts_what_is_there(sources, alone):
    about, header = json.loads(Path(f"{alone}.json").read_text()), check_prefix(str(alone))
    assert (about["documents"], about["sequences"]) == (header.documents, header.sequences)
    assert about["tokens"] == header.tokens == about["bytes"] + 6002
    assert about["sha256"] == {name: sha256_of(f"{alone}.{name}") for name in ("bin", "idx")}
    assert about["skipped"] == {"empty document": 1} and about["on_error"] == "fail"
    assert about["tokenizer"]["kind"] == "bytes" and about["sources"] == [str(sources)]
    assert sorted(p.name for p in alone.parent.iterdir()) == ["data.bin", "data.idx", "data.json", "data.tokenizer"]


def test_workers_make_the_same_bytes(sources, alone, tmp_path):
    assert run(sources, "--output", tmp_path / "two", "--workers", 2).returncode == 0
    assert digests(tmp_path / "two") == digests(alone)


@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_make_the_same_bytes(ranks, sources, alone, tmp_path):
    result = run(sources, "--output", tmp_path / "data", ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert digests(tmp_path / "data") == digests(alone)
    assert result.stdout.count("documents") == 1


@needs_mpi
def test_an_error_on_any_rank_is_one_sentence_and_skip_goes_on_from_there(sources, tmp_path):
    (tmp_path / "in").mkdir()
    rows = [json.dumps({"text": "word " * 100}) for _ in range(9000)]
    rows[8000] = '{"body": 1}'
    (tmp_path / "in/rows.jsonl").write_text("\n".join(rows))
    result = run(tmp_path / "in", "--output", tmp_path / "data", ranks=2)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1 and "rows.jsonl, line 8001: without the key" in result.stderr
    assert [p.name for p in tmp_path.glob("data*")] == ["data.parts"]
    result = run(tmp_path / "in", "--output", tmp_path / "data", "--on_error", "skip")
    assert result.returncode == 0 and "going on:" in result.stderr
    assert "8,999 documents" in result.stdout and "left out: 1 x without the key" in result.stdout
    assert json.loads((tmp_path / "data.json").read_text())["first_skipped"] == {
        "without the key": f"{tmp_path / 'in/rows.jsonl'}, line 8001"
    }
    assert not (tmp_path / "data.parts").exists()


def slow_tokenizer(folder: Path) -> dict[str, str]:
    """An environment in which tokenizing takes its time, so that a signal meets it at work."""
    (folder / "sitecustomize.py").write_text(
        "import sys\nif any('prepare_data' in a or 'spawn' in a for a in sys.orig_argv):\n"
        "    import time\n    from vqmoe_ds.data.tokenizers import ByteTokenizer as T\n    encode = T.encode_batch\n"
        "    T.encode_batch = lambda self, texts: (time.sleep(0.3), encode(self, texts))[1]\n"
    )
    return {**ENVIRONMENT, "PYTHONPATH": f"{folder}:{ROOT}"}


def descendants(pid: int) -> list[int]:
    children = [int(c) for t in Path(f"/proc/{pid}/task").glob("*") for c in (t / "children").read_text().split()]
    return children + [d for child in children for d in descendants(child)]


@pytest.mark.parametrize(
    "launcher, options",
    [
        pytest.param([str(MPIRUN), "-n", "2", "--oversubscribe"], [], marks=needs_mpi, id="rank"),
        pytest.param([], ["--workers", "2"], id="worker"),
        pytest.param([], [], id="alone"),
    ],
)
def test_after_a_kill_nothing_looks_whole_and_a_rerun_goes_on(launcher, options, sources, alone, tmp_path):
    command = [*launcher, *PREPARE, str(sources), "--output", str(tmp_path / "data"), *options]
    process = subprocess.Popen(command, env=slow_tokenizer(tmp_path), stderr=subprocess.PIPE, text=True)
    parts, deadline = tmp_path / "data.parts", time.monotonic() + 60
    while len([p for p in parts.glob("*") if p.is_dir() and p.suffix != ".tmp"]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [d for d in descendants(process.pid) if b"tokenizer" not in Path(f"/proc/{d}/cmdline").read_bytes()]
    workers = [w for w in workers if b"resource_tracker" not in Path(f"/proc/{w}/cmdline").read_bytes()]
    os.kill(workers[-1] if workers else process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not list(tmp_path.glob("data.[bij]*"))
    if options:
        assert "error: a worker was killed" in errors and process.returncode == 2
    finished = {p.name: p.stat().st_mtime_ns for p in parts.iterdir() if p.is_dir() and p.suffix != ".tmp"}
    assert 2 <= len(finished) < 7
    result = run(sources, "--output", tmp_path / "data")
    assert result.returncode == 0 and "going on:" in result.stderr, result.stderr
    assert digests(tmp_path / "data") == digests(alone)


def test_parts_of_another_plan_and_damaged_parts_are_made_again(sources, alone, tmp_path):
    command = [*PREPARE, str(sources), "--output", str(tmp_path / "data")]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))}
    run(*command[2:], **limit)  # parts fit, the whole does not
    parts = [path for path in (tmp_path / "data.parts").iterdir() if path.is_dir()]
    assert len(parts) == 7
    with (parts[0] / "tokens").open("r+b") as stream:
        stream.write(b"\xff\xff")
    (parts[1] / "lengths").unlink()
    other = run(sources, "--output", tmp_path / "data", "--document", "line", **limit)
    assert "going on" not in other.stderr
    result = run(*command[2:])
    assert result.returncode == 0 and "going on:" in result.stderr
    assert digests(tmp_path / "data") == digests(alone)


def test_a_full_disk_is_one_sentence_and_leaves_earlier_output_alone(sources, tmp_path):
    (tmp_path / "small.txt").write_text("small")
    assert run(tmp_path / "small.txt", "--output", tmp_path / "data").returncode == 0
    before = digests(tmp_path / "data")
    for limit in (500 << 10, 3 << 20):  # in a part; in the merge
        result = run(
            *(sources, "--output", tmp_path / "data", "--overwrite"),
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert result.stderr.startswith("error: no room left in") and "earlier output is untouched" in result.stderr
        assert digests(tmp_path / "data") == before and not list(tmp_path.rglob("*.tmp"))
    result = run(sources, "--output", tmp_path / "data", "--overwrite")
    assert result.returncode == 0 and digests(tmp_path / "data") != before


def test_mistakes_are_refused_before_any_work(sources, alone, tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("text")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "vocab.txt").write_text("only\nthese\n")
    cases = {
        (): "no source given",
        (text,): "no --output PREFIX given",
        (text, "--output", tmp_path): "is a folder; add the name",
        (text, "--output", tmp_path / "o", "--workers", "0"): "--workers 0 must be at least 1",
        (text, "--output", alone): "data.idx exists; give another --output, or --overwrite",
        (tmp_path / "no.txt", "--output", tmp_path / "o"): "no.txt does not exist",
        (text, "--output", tmp_path / "o", "--tokenizer", "no.model"): "tokenizer no.model does not exist",
        (tmp_path / "blank.txt", "--output", tmp_path / "o"): "hold no document (1 empty document)",
        (text, "--output", tmp_path / "u", "--tokenizer", tmp_path / "vocab.txt"): "lacks the symbols of 50.0 %",
    }
    for arguments, message in cases.items():
        assert main(build_parser("").parse_args([*map(str, arguments)])) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_a_run_that_was_killed_while_it_published_goes_on(renames, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("text")
    options = build_parser("").parse_args([str(tmp_path / "t.txt"), "--output", str(tmp_path / "data")])
    rename, done = os.rename, []

    def killed(source, target):
        if Path(target).parent == tmp_path:
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        prepare(options)
    if renames == 3:
        (tmp_path / "data.tokenizer/tokenizer.json").unlink()  # a second one may die while it removes the first's
    assert not Path(f"{options.output}.idx").exists() and prepare(options).documents == 1
    with pytest.raises(DataError, match="data.idx exists"):
        prepare(options)


def test_a_power_cut_leaves_no_index_without_the_rest(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("one two")
    (tmp_path / "vocab.txt").write_text("one\ntwo\n")
    fsync, rename, synced, before = os.fsync, os.rename, [], []

    def sync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def move(source, target):
        if str(target).endswith(".idx"):
            before.extend(synced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", move)
    options = ["--output", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "vocab.txt")]
    prepare(build_parser("").parse_args([str(tmp_path / "t.txt"), *options]))
    made = [tmp_path / f"data.{name}" for name in ("bin", "json", "tokenizer")]
    assert {path.stat().st_ino for path in [*made, *made[-1].iterdir()]} <= set(before)
    assert synced[-1] == before[-1] == tmp_path.stat().st_ino, "the names of them, then that of the index"


def test_a_lock_that_stays_until_it_is_closed_spoils_nothing(tmp_path, monkeypatch):
    """NFS renames an open file that is removed, so that its folder is not empty."""
    (tmp_path / "t.txt").write_text("text")
    rmdir, tries = os.rmdir, []

    def not_empty_at_first(path, **kwargs):
        if str(path).endswith("data.parts"):
            tries.append(path)
            if len(tries) == 1:
                raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rmdir(path, **kwargs)

    monkeypatch.setattr(os, "rmdir", not_empty_at_first)
    assert prepare(build_parser("").parse_args([str(tmp_path / "t.txt"), "--output", str(tmp_path / "data")])).tokens
    assert sorted(p.name for p in tmp_path.glob("data*")) == ["data.bin", "data.idx", "data.json", "data.tokenizer"]


def test_a_tokenizer_that_cannot_be_read_is_replaced_on_request_alone(tmp_path):
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "data.tokenizer").mkdir()
    arguments = [str(tmp_path / "t.txt"), "--output", str(tmp_path / "data")]
    with pytest.raises(DataError, match="data.tokenizer exists; .* --overwrite"):
        prepare(build_parser("").parse_args(arguments))
    assert prepare(build_parser("").parse_args([*arguments, "--overwrite"])).documents == 1


def test_unknown_symbols_are_counted_below_the_limit(tmp_path):
    (tmp_path / "t.txt").write_text("one two three")
    (tmp_path / "vocab.txt").write_text("one\ntwo\n")
    options = ("--tokenizer", tmp_path / "vocab.txt", "--max_unknown", 60)
    result = run(tmp_path / "t.txt", "--output", tmp_path / "data", *options)
    assert "unknown symbols: 1 tokens (25.000 %)" in result.stdout
    assert json.loads((tmp_path / "data.json").read_text())["unknown"] == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    code = (
        "import sys; from vqmoe_ds.data.prepare import build_parser, main; "
        "code = main(build_parser('').parse_args(sys.argv[1:])); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(code)"
    )
    for lines in (40_000, 250_000):
        with (tmp_path / f"{lines}.txt").open("w") as stream:
            stream.writelines(f"line {i} of a text of {lines} lines that say little\n" for i in range(lines))
        arguments = [str(tmp_path / f"{lines}.txt"), "--output", str(tmp_path / str(lines))]
        command = [sys.executable, "-c", code, *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT).stdout
        peaks.append(int(output.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 8, f"MiB for 2 and 13 MB: {peaks}"


def test_shares_are_even_and_complete(sources):
    units = plan_units([str(sources)], SourceOptions())
    for ranks in (1, 2, 4, 9):
        shares = deal(units, ranks)
        assert len(shares) == ranks
        assert sorted((u for share in shares for u in share), key=units.index) == units
        loads = [sum(u.size for u in share) for share in shares]
        assert max(loads) - min(loads) <= max(u.size for u in units)


def test_a_reader_of_the_recipes_may_leave_early() -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as head does when it has seen enough
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--list_recipes"]
    left = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=ENVIRONMENT)
    os.close(writing)
    assert left.returncode == 0 and left.stderr == ""


# ------------------------------------------------------------ --max_tokens


def _prefix(alone: Path, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, lengths of sequences): what ``--max_tokens`` asks for, told from the whole corpus of bytes."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(alone))
    lengths, ends = data.sequence_lengths.tolist(), set(data.document_indices.tolist())
    taken = total = 0
    for number, length in enumerate(lengths):
        if total + length + (number + 1 not in ends) > most:
            break
        taken, total = taken + 1, total + length
    ids = np.fromfile(f"{alone}.bin", dtype=np.uint16)[:total]
    kept = lengths[:taken]
    if taken not in ends:  # the document that is cut ends here
        ids, kept[-1] = np.append(ids, 256), kept[-1] + 1
    return ids, np.array(kept)


@pytest.mark.parametrize(
    "most",
    [
        *(70_000, 1_100_000, 1_049_000),  # inside the first unit, inside the second, about where it begins
        *(2_600_000, 4_000_000, 10**9),  # inside the JSON lines, and all
    ],
)
def test_max_tokens_takes_the_first_documents_whatever_the_workers(most, sources, alone, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    want_ids, want_lengths = _prefix(alone, most)
    for workers in (1, 3):
        prefix = tmp_path / f"w{workers}"
        options = ["--output", str(prefix), "--max_tokens", str(most), "--workers", str(workers)]
        assert main(build_parser("").parse_args([str(sources), *options])) == 0
        assert np.array_equal(np.fromfile(f"{prefix}.bin", dtype=np.uint16), want_ids) and len(want_ids) <= most
        data = IndexedDataset(str(prefix))
        lengths = data.sequence_lengths.copy()
        if lengths[-1] == 1:  # the end of a document whose last sequence was written before
            lengths = np.append(lengths[:-2], lengths[-2] + 1)
        assert np.array_equal(lengths, want_lengths)
        about = json.loads(Path(f"{prefix}.json").read_text())
        assert about["tokens"] == len(want_ids) and about["max_tokens"] == most
        assert not Path(f"{prefix}.parts").exists()
    assert digests(tmp_path / "w1") == digests(tmp_path / "w3")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_stream_is_read_and_kept_as_far_as_it_is_asked_for(kind, tmp_path, monkeypatch):
    """A folder that ``datasets`` streams without a network: three files of 4,000 texts of 26 tokens."""
    from vqmoe_ds.data import tables

    (tmp_path / "set").mkdir()
    for shard in range(3):
        texts = [f"text {shard} {i:04d} of some words" for i in range(4000)]
        path = tmp_path / f"set/train-{shard}.{kind}"
        if kind == "parquet":
            parquet.write_table(pa.table({"text": texts}), path, row_group_size=100)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    read = []
    pieces_of = tables.pieces_of
    monkeypatch.setattr(tables, "pieces_of", lambda *row: read.append(1) or pieces_of(*row))
    monkeypatch.setattr("vqmoe_ds.data.parts.BATCH_BYTES", 10_000)
    source, cache = f"hub:{tmp_path / 'set'}", ["--cache_dir", str(tmp_path / "cache")]
    for most, rows in ((52_000, 2000), (156_000, 6000)):
        read.clear()
        prefix = tmp_path / f"first{most}"
        options = ["--output", str(prefix), "--streaming", "--max_tokens", str(most), *cache]
        assert main(build_parser("").parse_args([source, *options])) == 0
        assert rows <= len(read) < rows + 200  # no more than a batch of texts beyond what was asked for
        ids = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
        last = f"text {rows // 4001} {(rows - 1) % 4000:04d} of some words"
        assert len(ids) == most and bytes(ids[-26:-1].astype(np.uint8)).decode() == last
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # datasets kept no copy


def test_a_killed_stream_leaves_nothing_that_looks_whole_and_goes_on(tmp_path):
    (tmp_path / "set").mkdir()
    for shard in range(6):
        texts = [f"text {i} of shard {shard} " + "word " * 50 for i in range(500)]
        parquet.write_table(pa.table({"text": texts}), tmp_path / f"set/train-{shard}.parquet")
    command = [
        f"hub:{tmp_path / 'set'}",
        "--streaming",
        "--max_tokens",
        "600000",
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    output = tmp_path / "data"
    process = subprocess.Popen([*PREPARE, *command, "--output", str(output)], env=slow_tokenizer(tmp_path))
    parts, deadline = tmp_path / "data.parts", time.monotonic() + 100
    while len([p for p in parts.glob("*") if p.is_dir() and p.suffix != ".tmp"]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("data.[bij]*"))
    finished = {p.name for p in parts.iterdir() if p.is_dir() and p.suffix != ".tmp"}
    assert 2 <= len(finished) < 5
    assert main(build_parser("").parse_args([*command, "--output", str(output)])) == 0
    assert main(build_parser("").parse_args([*command, "--output", str(tmp_path / "again")])) == 0
    assert digests(output) == digests(tmp_path / "again")
    assert json.loads(Path(f"{output}.json").read_text())["tokens"] <= 600_000


def test_a_first_part_without_a_token_leaves_the_time_open(capsys):
    with Progress(2_000_000, 2_000_000, " tokens") as progress:
        progress.every = 0.0
        progress.add(0)
    assert capsys.readouterr().err == "preparing: 0.0 of 2.0 M tokens, 0.0 M tokens/s, ? left\n"


def test_no_more_is_said_to_be_made_than_is_taken(capsys):
    """Parts that workers make side by side have more tokens together than ``--max_tokens`` takes of them."""
    with Progress(500_000, 500_000, " tokens") as progress:
        for done in ("0.4", "0.5", "0.5"):
            progress.every = 0.0
            progress.add(400_000)
            assert f"preparing: {done} of 0.5 M tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max_tokens", "0"], "--max_tokens 0 must be at least 1"),
        (["--max_tokens", "20"], "--max_tokens 20 is less than the first text takes; give more"),
    ],
)
def test_a_limit_that_nothing_fits_is_refused(options, sentence, sources, tmp_path, capsys):
    assert main(build_parser("").parse_args([str(sources), "--output", str(tmp_path / "data"), *options])) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert not list(tmp_path.glob("data.[bij]*"))


def test_a_limit_is_not_for_ranks(sources, tmp_path):
    options = build_parser("").parse_args([str(sources), "--output", str(tmp_path / "data"), "--max_tokens", "9"])
    with pytest.raises(DataError, match="--max_tokens does not go with mpirun; give --workers"):
        prepare(options, comm=object())

"""Files and folders of data, tokenizers, checkpoints and results with any bytes in them, made here and damaged by seed.

Each reader goes on as far as a user of it would: data are opened and read, models loaded, reports made.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.evaluation.routed_models import model_of
from tests.fuzz.mutate import mutated, mutated_value
from tests.fuzz.running import fuzz
from tests.huggingface import ModelReader
from tests.prepared import write_sequences, write_texts
from vqmoe_ds.checkpoint.convert import build_parser, check_complete, convert
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.inspect import _text as text_of_checkpoint
from vqmoe_ds.checkpoint.inspect import inspect as inspect_checkpoint
from vqmoe_ds.checkpoint.io.store import (
    MANIFEST,
    find_newest,
    read_best,
    read_manifest,
    write_manifest,
    write_sealed,
)
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.documents import plan_units, read_unit
from vqmoe_ds.data.index_cache import SIDECAR, seal, why_unsound
from vqmoe_ds.data.indexed import open_indexed_text
from vqmoe_ds.data.inspect import _text as text_of_data
from vqmoe_ds.data.inspect import inspect as inspect_data
from vqmoe_ds.data.labelled import open_labelled
from vqmoe_ds.data.parts import Parts
from vqmoe_ds.data.prepare import build_parser as prepare_parser
from vqmoe_ds.data.prepare import prepare
from vqmoe_ds.data.raw_text import split_corpus
from vqmoe_ds.data.recipes import Recipe, _kept
from vqmoe_ds.data.tokenizer_training import train_pieces, train_words
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.data.units import SourceOptions
from vqmoe_ds.evaluation import generate_command
from vqmoe_ds.experiments import measures
from vqmoe_ds.experiments.finetuned import read_bag_of_words, read_runs, report
from vqmoe_ds.finetune.predict import _texts
from vqmoe_ds.runtime.errors import UserError
from vqmoe_ds.runtime.files import new_folder

TEXT = "The first line.\nThe second, é and €.\n\nA paragraph\tof its own\n" * 3
ROWS = [{"text": f"{word} and more", "label": word, "id": i} for i, word in enumerate(("good", "bad", "ugly") * 2)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = "".join(f'{row["id"]},"{row["text"]}",{row["label"]}\n' for row in ROWS)
SHARE = 0.03  # of VQMOE_FUZZ_MINUTES for each of some 30 readers

Files = tuple[str, bytes]
"""A name inside the folder that is read, and what is to stand there."""


def _damaged(value: Files, rng: random.Random) -> Files:
    name, content = value
    if name.endswith(".json") and rng.random() < 0.6:
        try:
            return name, json.dumps(mutated_value(json.loads(content), rng)).encode()
        except ValueError:  # a number that JSON cannot write
            pass
    return name, mutated(content, rng)


def _files_of(folder: Path) -> list[Files]:
    return [
        (path.relative_to(folder).as_posix(), path.read_bytes())
        for path in sorted(folder.rglob("*.*"))
        if path.is_file()
    ]


def _fuzz_folder(reader: str, folder: Path, corpus: list[Files], read: Callable[[], Any], count: int) -> None:
    """Try damages to one file at a time, which is as before after each."""

    def read_one(value: Files) -> None:
        name, content = value
        path, before = folder / name, (folder / name).read_bytes()
        path.write_bytes(content)
        try:
            read()
        finally:
            path.write_bytes(before)

    fuzz(reader, corpus, _damaged, read_one, (UserError,), count, SHARE)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("name", ["text.txt", "text.bin"])
def test_raw_text(name: str, tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        train, valid = split_corpus(open_corpus(str(tmp_path)), 4, 2)
        assert train.read(np.arange(len(train))).inputs_BS.max() < 256 and len(valid)

    fuzz(f"raw {name}", [TEXT.encode()], mutated, read, (UserError,), 50, SHARE)


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


def _zstd(content: bytes) -> bytes:
    stream = io.BytesIO()
    with pa.CompressedOutputStream(stream, "zstd") as out:
        out.write(content)
        out.flush()
        return stream.getvalue()


DOCUMENTS = {
    "plain.txt": TEXT.encode(),
    "rows.jsonl": JSONL,
    "rows.json": JSONL,
    "packed.txt.gz": gzip.compress(TEXT.encode()),
    "packed.jsonl.bz2": bz2.compress(JSONL),
    "packed.txt.xz": lzma.compress(TEXT.encode()),
    "packed.jsonl.zst": _zstd(JSONL),
    "table.parquet": _parquet(),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(name: str, tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        for on_error in ("skip", "fail"):
            for document in ("file", "paragraph", "line") if name == "plain.txt" else ("file",):
                options = SourceOptions(document=document, on_error=on_error)
                for unit in plan_units([str(tmp_path)], options):
                    for piece in read_unit(unit):
                        piece.text.encode()

    fuzz(f"documents {name}", [DOCUMENTS[name]], mutated, read, (UserError,), 40, SHARE)


LABELLED = {
    "rows.csv": f"id,text,label\n{CSV}".encode(),
    "rows.tsv": f"id\ttext\tlabel\n{CSV}".replace(",", "\t").encode(),
    "rows.jsonl": JSONL,
    "rows.txt": "".join(f"{row['label']} {row['text']}\n" for row in ROWS).encode(),
    "rows.csv.gz": gzip.compress(f"id,text,label\n{CSV}".encode()),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_sets(name: str, tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        open_labelled(str(tmp_path / name), on_error="skip")
        assert len(open_labelled(str(tmp_path / name))) > 0

    fuzz(f"labelled {name}", [LABELLED[name]], mutated, read, (UserError,), 40, SHARE)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_prepared_data(dtype: type, tmp_path: Path) -> None:
    prefix = write_texts(tmp_path / "data", [TEXT[:90], "x", TEXT[:40], "y" * 30] * 3)
    write_sequences(tmp_path / "bare", [[1, 2, 3] * 9, [4] * 12, [5, 6] * 9] * 4, dtype)
    model = {"sequence_length": 4, "vocab_size": 257}

    def read() -> None:
        for path in (prefix, str(tmp_path / "bare")):
            config = RunConfig(model=model, data={"path": path, "split": "50,50"})
            data = open_indexed_text(config)
            assert data is not None and len(data.train) > 0
            text_of_data(inspect_data(path))

    _fuzz_folder(f"prepared {dtype.__name__}", tmp_path, _files_of(tmp_path), read, 200)


def test_index_cache(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    np.save(folder / "0-shuffle_index.npy", np.arange(9))
    np.save(folder / "0-document_index.npy", np.arange(5, dtype=np.int32))
    seal(folder)
    shapes = {"shuffle_index": [(9,)], "document_index": [(5,)]}
    assert why_unsound(folder, shapes) is None

    def read_sealed() -> None:
        reason = why_unsound(folder, shapes)
        assert reason is None or len(reason) < 600

    def read_forged() -> None:
        (folder / SIDECAR).unlink()
        seal(folder)
        read_sealed()

    _fuzz_folder("index", folder, _files_of(folder), read_sealed, 100)
    _fuzz_folder("forged index", folder, [f for f in _files_of(folder) if f[0] != SIDECAR], read_forged, 100)


def test_parts_of_a_preparation_and_a_recipe_that_was_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    parts = Parts(tmp_path / "out.parts", load_tokenizer("bytes"))
    parts.folder.mkdir()
    (unit,) = plan_units([str(tmp_path / "a.txt")], SourceOptions())
    parts.make(unit)
    recipe = Recipe("some", "nowhere", 1, "none")
    (tmp_path / "some.jsonl").write_bytes(JSONL)
    (tmp_path / "some.json").write_text(json.dumps({"sha256": "0" * 64}))

    def read() -> None:
        assert _kept(recipe, tmp_path) is None
        counts = parts.counts(unit, verify=True)
        assert counts is None or counts.documents == 1

    corpus = [file for file in _files_of(tmp_path) if file[0].endswith(".json")]
    assert len(corpus) == 2
    _fuzz_folder("parts", tmp_path, corpus, read, 200)


# ---------------------------------------------------------------- tokenizers


def _tokenizer_json(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "</s>"]
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram", "json", "saved json"])
def test_tokenizers(kind: str, tmp_path: Path) -> None:
    if kind == "word":
        train_words([TEXT], 12).save(tmp_path)
    elif "json" in kind:
        _tokenizer_json(tmp_path)
    else:
        train_pieces([TEXT * 3], kind, 286).save(tmp_path)
    if kind == "saved json":
        load_tokenizer(tmp_path).save(tmp_path / "saved")
    folder = tmp_path / "saved" if kind == "saved json" else tmp_path
    payload = next((path for path in folder.iterdir() if path.suffix in (".txt", ".model")), None)

    def read() -> None:
        for source in (folder, *([payload] if payload is not None else [])):
            tokenizer = load_tokenizer(source)
            ids = tokenizer.encode(TEXT[:60])
            tokenizer.decode(ids)
            assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
            tokenizer.starts(TEXT[:60], ids)

    _fuzz_folder(f"tokenizer {kind}", folder, _files_of(folder), read, 100)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, of small models."""
    top = tmp_path_factory.mktemp("checkpoints")
    for name, case in (("portable", "vq"), ("of topk", "topk, two")):
        with new_folder(top / name, False) as into:
            write_portable(ModelReader(model_of(case)), into)
    for source, target, *options in (
        ("portable", "deepspeed", "--zero", "2", "--world", "2"),
        ("portable", "hf"),
        ("of topk", "megatron", "--tp", "2"),
    ):
        told = [str(top / source), str(top / target), "--to", target, *options]
        convert(build_parser("").parse_args(told))
    _write_native(top / "native")
    return top


def _write_native(folder: Path) -> None:
    folder.mkdir()
    stem = "l.0.deepspeed_moe.experts.deepspeed_experts"
    model = {
        **{"module": {"embed": torch.ones(4, 3), "table": torch.ones(2)}, "buffer_names": ["table"]},
        **{"num_experts": [2], "dp_world_size": 1, "ds_config": {}, "global_steps": 3, "shared_params": {}},
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for expert in range(2):
        weights = {f"{stem}.{expert}.w": torch.ones(3, 3)}
        torch.save(weights, folder / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt")


def _damaged_checkpoint(value: Files, rng: random.Random) -> Files:
    """As ``_damaged``; of a .pt often its pickle alone, in a sound archive."""
    name, content = value
    if not name.endswith(".pt") or rng.random() < 0.3:
        return _damaged(value, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for record in old.infolist():
            stream: Any = old.open(record)
            stream._expected_crc = None  # weights are written without, and nothing reads it
            data = stream.read()
            new.writestr(record.filename, mutated(data, rng) if record.filename.endswith("data.pkl") else data)
    return name, out.getvalue()


def _read_checkpoint(folder: Path) -> None:
    reader = open_checkpoint(folder)
    check_complete(reader)
    for name in reader.names():
        reader.tensor(name)
    text_of_checkpoint(inspect_checkpoint(str(folder), str(folder)))
    if "native" not in reader.config:
        loaded = load_model(folder, "bytes")
        loaded.model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("kind", ["portable", "deepspeed", "hf", "megatron", "native"])
def test_checkpoints(kind: str, checkpoints: Path, tmp_path: Path) -> None:
    """Files that the manifest vouches for are sealed again: somebody forged them, or they are of no manifest."""
    folder = tmp_path / kind
    shutil.copytree(checkpoints / kind, folder)
    tag = folder / "global_step0000007" if kind == "deepspeed" else folder
    sealed = (tag / MANIFEST).exists()
    manifest = read_manifest(tag) if sealed else {}
    corpus = [file for file in _files_of(folder) if not file[0].endswith((".md", ".py", MANIFEST))]

    def read(value: Files) -> None:
        name, content = value
        path, before = folder / name, (folder / name).read_bytes()
        path.write_bytes(content)
        if sealed:
            write_manifest(tag, {key: manifest[key] for key in manifest if key != "files"})
        try:
            _read_checkpoint(tag)
        finally:
            path.write_bytes(before)

    fuzz(f"checkpoint {kind}", corpus, _damaged_checkpoint, read, (UserError,), 50, SHARE)


@pytest.mark.parametrize("kind", ["portable", "deepspeed"])
def test_manifests_and_marks(kind: str, checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / kind
    shutil.copytree(checkpoints / kind, folder)
    tag = folder / "global_step0000007" if kind == "deepspeed" else folder
    manifest = read_manifest(tag)

    def read_forged(content: Any) -> None:
        if isinstance(content, dict):
            write_sealed(tag / MANIFEST, content)
        found = find_newest(folder)
        assert all(len(reason) < 2500 for reason in found.passed_over)
        _read_checkpoint(tag)

    def read_damaged(content: bytes) -> None:
        (tag / MANIFEST).write_bytes(content)
        (folder / "best").write_bytes(content)
        read_best(folder)
        find_newest(folder)
        read_forged(None)

    def forged(value: Any, rng: random.Random) -> Any:
        while True:
            try:
                changed = mutated_value(value, rng)
                json.dumps(changed)
                return changed
            except ValueError:
                continue

    fuzz(f"forged manifest of {kind}", [manifest], forged, read_forged, (UserError,), 50, SHARE)
    write_sealed(tag / MANIFEST, manifest)
    whole = (tag / MANIFEST).read_bytes()
    fuzz(f"manifest of {kind}", [whole], mutated, read_damaged, (UserError,), 40, SHARE)


# ---------------------------------------------------------------- evaluation and reports


def test_prompts_and_rows_to_classify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"

    def read(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        path.write_bytes(content)
        rows = _texts(Namespace(text=None, file=str(path), text_key="text"))
        assert all(isinstance(text, str) for text in islice(rows, 1000))
        assert isinstance(generate_command._piped(), str)

    fuzz("prompts", [JSONL], mutated, read, (UserError,), 150, SHARE)


def _write_run(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {"step": step, "loss": 3.0 / step, "bits_per_byte": 2.0 / step, "tokens_per_second": 9.0}
        | {name: [1.0, 2.0] for name in ("busiest_expert", "load_variation", "code_perplexity", "fluctuation")}
        for step in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        **{"validation_bits_per_byte": 2.0, "validation_loss": 1.5, "seed": 3, "task": "lm", "data": "text"},
        **{"finetune": {"shots": 0}, "parameters": {"active": 100}},
        "validations": [{"step": 0, "validation_bits_per_byte": 2.5}, {"step": 9, "validation_bits_per_byte": 2.0}],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    mean = {"bits_per_byte": 2.2, "bits_per_byte_rise": 0.2, "nats_per_token": 2.0, "nats_per_token_rise": 0.1}
    row = {"kind": "typo", "rate": 0.1, "mode": "as_read", "mean": mean}
    (folder / "evaluation.json").write_text(json.dumps({"corrupted": [row]}))


def test_results_that_reports_are_made_of(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _write_run(run)
    bag = [{"task": "lm", "shots": "all", "seed": 0, "accuracy": 0.5, "macro_f1": 0.4}]
    (run / "bag.json").write_text(json.dumps(bag))

    def read() -> None:
        measures.losses(run)
        measures.health(run)
        measures.curve(run, True)
        runs = read_runs(f"name={run}")
        read_bag_of_words(str(run / "bag.json"), runs)
        report([*runs, *runs]).markdown()

    _fuzz_folder("results", run, _files_of(run), read, 300)


def test_a_preparation_of_anything_ends_in_a_corpus_or_a_sentence(tmp_path: Path) -> None:
    """The whole way: from documents to files that training takes."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out" / "data"
    output.parent.mkdir()

    def read(content: bytes) -> None:
        source.write_bytes(content)
        prepare(prepare_parser("").parse_args([str(source), "--output", str(output), "--overwrite"]))
        text_of_data(inspect_data(str(output), verify=True))

    fuzz("preparation", [JSONL], mutated, read, (UserError,), 40, SHARE)


@pytest.fixture(autouse=True)
def _quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Bars and panics of libraries are not this test's to show."""
    yield

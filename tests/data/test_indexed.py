"""Prepared corpora: every window once an epoch, whoever reads it; boundaries masked; bad names refused at once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import run_ranks
from tests.prepared import write_sequences, write_texts
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import MASKED, Batch
from vqmoe_ds.data.indexed import IndexedBatches, IndexedText, open_indexed_text, split_shares
from vqmoe_ds.data.portions import members
from vqmoe_ds.runtime.errors import DataError

LENGTH, BATCH = 8, 16


def _config(path: str | list[str], batch_size: int = BATCH, vocab_size: int = 60000, **data: Any) -> RunConfig:
    model = {"sequence_length": LENGTH, "vocab_size": vocab_size}
    train = {"batch_size": batch_size, "seed": 5}
    return RunConfig(model=model, train=train, data={"path": path, **data})


def _batches(config: RunConfig, cache: Path) -> IndexedBatches:
    data = open_indexed_text(config)
    assert data is not None
    return data.open(config, cache)[0]


def _numbered(prefix: Path, first: int, count: int, seed: int = 0) -> str:
    """Sequences of unlike lengths whose tokens count upwards, so that every token tells where it stands."""
    sizes = np.random.default_rng(seed).integers(1, 60, count)
    ends = first + np.cumsum(sizes)
    return write_sequences(prefix, [range(end - size, end) for end, size in zip(ends, sizes, strict=True)])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    return [_numbered(folder / "a", 0, 100), _numbered(folder / "b", 20000, 41, seed=1)]


def _epoch_of(batches: list[Batch]) -> np.ndarray:
    """First token of every window."""
    return np.concatenate([batch.inputs_BS[:, 0] for batch in batches])


# ------------------------------------------------------------------------- order


def _read(rank: int, world: int, config: RunConfig, cache: str, steps: list[int], size: int) -> list[list[np.ndarray]]:
    batches = _batches(config, Path(cache))
    return [[batch.inputs_BS for batch in batches.micro_batches(BATCH * step, rank, world, size)] for step in steps]


def _global_batches(world: int, config: RunConfig, cache: Path, steps: list[int], size: int) -> list[np.ndarray]:
    """The windows of each step in the order of their sample numbers, read by ``world`` ranks."""
    answers = run_ranks(world, _read, config, str(cache), steps, size)
    return [np.stack([answer[i] for answer in answers], axis=1).reshape(-1, LENGTH) for i in range(len(steps))]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_global_batch_is_the_same_for_any_ranks_and_micro_batches_from_any_step_on(corpora, tmp_path, weighted):
    path = [f"0.7:{corpora[0]}", f"0.3:{corpora[1]}"] if weighted else corpora
    config, steps = _config(path), [0, 1, 20, 21, 22, 23, 24]  # an epoch ends among the last
    one = _global_batches(1, config, tmp_path / "one", steps, BATCH)
    four = _global_batches(4, config, tmp_path / "four", steps, 2)
    two = _global_batches(2, config, tmp_path / "two", steps[3:], 8)
    assert all(np.array_equal(a, b) for a, b in zip(one, four, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(one[3:], two, strict=True))
    built = sorted(folder.name for folder in (tmp_path / "four").iterdir())
    assert built == sorted(folder.name for folder in (tmp_path / "one").iterdir()), "one index for all ranks"


def _two_epochs(rank: int, world: int, config: RunConfig, cache: str) -> tuple[int, np.ndarray]:
    batches = _batches(config, Path(cache))
    count = sum(map(len, batches.portions))
    assert batches.epoch(count) == 1.0
    return count, _epoch_of([batches.micro_batches(step, 0, 1, 1)[0] for step in range(2 * count)])


@pytest.mark.parametrize("number", [1, 2])
def test_an_epoch_has_every_window_of_every_corpus_once_and_the_next_another_order(corpora, tmp_path, number):
    [(count, starts)] = run_ranks(1, _two_epochs, _config(corpora[:number], batch_size=1), str(tmp_path))
    first, second = starts[:count], starts[count:]
    assert len(set(first)) == len(set(second)) == count
    assert list(first) != list(second)
    assert (np.diff(first) > 0).mean() == pytest.approx(0.5, abs=0.1), "not shuffled"


def _targets(rank: int, world: int, config: RunConfig, cache: str) -> list[int]:
    batches = _batches(config, Path(cache))
    count = sum(map(len, batches.portions))
    read = [batches.micro_batches(step, 0, 1, 1)[0] for step in range(count)]
    return [int(t) for batch in read for t in batch.targets_BS.ravel() if t != MASKED]


def test_every_token_is_a_target_once_an_epoch_save_starts_and_a_remainder(corpora, tmp_path):
    config = _config(corpora[0], batch_size=1)
    [targets] = run_ranks(1, _targets, config, str(tmp_path))
    data = open_indexed_text(config)
    sequences = 90  # nine tenths of 100; the first token of each is nobody's target
    assert Counter(targets).most_common(1)[0][1] == 1
    assert sum(data.train.tokens) - sequences - LENGTH <= len(targets) <= sum(data.train.tokens) - sequences
    assert not set(targets) & _held_out_tokens(data)


def _held_out_tokens(data: IndexedText) -> set[int]:
    """Tokens of the tenth; those of ``_numbered`` corpora are all different and count up."""
    lengths = data.train.prefixes[0].lengths
    ends = np.cumsum(lengths)
    return {t for i in members(100, data.valid.share) for t in range(ends[i] - lengths[i], ends[i])}


def _places(rank: int, world: int, config: RunConfig, cache: str, steps: int) -> tuple[np.ndarray, list[int]]:
    batches = _batches(config, Path(cache))
    return np.array([place for step in range(steps) for place in batches.places(100 * step)]), list(
        map(len, batches.portions)
    )


def test_weights_hold_at_any_time_and_each_corpus_goes_through_epochs_of_its_own(corpora, tmp_path):
    config = _config([f"3:{corpora[0]}", f"1:{corpora[1]}"], batch_size=100)
    [(drawn, sizes)] = run_ranks(1, _places, config, str(tmp_path), 700)  # past one pattern of the blend
    share = np.cumsum(drawn[:, 0] == 0) / np.arange(1, len(drawn) + 1)
    assert np.abs(share - 0.75)[1000:].max() < 2e-3
    for portion, windows in enumerate(sizes):
        order = drawn[drawn[:, 0] == portion][:, 1:]
        expected = np.stack(np.divmod(np.arange(len(order)), windows), axis=1)
        assert np.array_equal(order, expected)


@pytest.mark.parametrize("split", ["90,10,0", "7,2,1", "969,30,1", "1,1"])
def test_shares_are_apart_whole_and_spread_over_the_corpus(split):
    count, bounds = 1000, [*split_shares(split), (split_shares(split)[1][1], 1.0)]
    shares = [members(count, share) for share in bounds]
    assert sorted(np.concatenate(shares)) == list(range(count))
    for indices, (first, last) in zip(shares, bounds, strict=True):
        assert len(indices) == round(last * count) - round(first * count), "as many as megatron-core takes"
        if len(indices) > 10:
            assert np.diff(indices, prepend=-1, append=count).max() <= 3 * count / len(indices)


def test_validation_is_like_training_where_a_corpus_ends_in_another_kind_of_text(tmp_path):
    """900 short documents, then 100 long ones: the last tenth of the documents has most of the tokens."""
    texts = ["short text"] * 900 + ["a much longer text. " * 50] * 100
    data = open_indexed_text(_config(write_texts(tmp_path / "text", texts)))
    assert len(data.valid) / (len(data.train) + len(data.valid)) == pytest.approx(0.1, abs=0.01)


# ------------------------------------------------------------------ masks and bytes


def test_no_target_follows_the_end_of_a_document_and_bytes_are_those_of_the_other_targets(tmp_path):
    texts = [f"Grüße Nr. {i}!" * (1 + i % 3) for i in range(60)]
    config = _config(write_texts(tmp_path / "text", texts), batch_size=20)
    batch = _batches(config, tmp_path / "cache").micro_batches(0, 0, 1, 20)[0]
    follows = batch.inputs_BS == 256
    assert follows.any()
    assert np.array_equal(batch.targets_BS == MASKED, follows), "just these"
    kept = np.where(batch.targets_BS == MASKED, 256, batch.targets_BS)
    assert np.array_equal(batch.bytes_B, (kept < 256).sum(axis=1)), "the end of a document stands for no byte"


def test_sequences_without_an_end_of_document_are_not_predicted_from_each_other(corpora, tmp_path):
    batch = _batches(_config(corpora[0]), tmp_path).micro_batches(0, 0, 1, BATCH)[0]
    kept = batch.targets_BS != MASKED
    assert not kept.all()
    assert np.array_equal(batch.targets_BS[kept], batch.inputs_BS[kept] + 1)
    assert batch.bytes_B is None, "the tokenizer is unknown"


def test_documents_are_told_apart_where_targets_are_masked_and_only_when_asked(corpora, tmp_path):
    plain = _batches(_config(corpora[0]), tmp_path / "one").micro_batches(0, 0, 1, BATCH)[0]
    batch = _batches(_config(corpora[0], separate_documents=True), tmp_path / "two").micro_batches(0, 0, 1, BATCH)[0]
    assert plain.positions_BS is None
    assert np.array_equal(batch.inputs_BS, plain.inputs_BS) and np.array_equal(batch.targets_BS, plain.targets_BS)
    first_BS = batch.positions_BS == 0
    follows_BS = np.diff(batch.inputs_BS, axis=1) == 1  # tokens of a document count upwards
    assert first_BS[:, 0].all() and np.array_equal(first_BS[:, 1:], ~follows_BS) and first_BS[:, 1:].any()
    assert np.array_equal(batch.positions_BS[:, 1:][follows_BS], batch.positions_BS[:, :-1][follows_BS] + 1)


def test_held_out_documents_are_told_apart_behind_their_ends(tmp_path):
    texts = [f"Nr. {i}!" * (1 + i % 3) for i in range(60)]
    config = _config(write_texts(tmp_path / "text", texts), separate_documents=True, split="50,50,0")
    windows = open_indexed_text(config).open(config, tmp_path / "cache")[1]
    batch = windows.read(np.arange(len(windows)))
    ends_BS = batch.inputs_BS == 256
    assert ends_BS[:, :-1].any() and np.array_equal(batch.positions_BS[:, 1:] == 0, ends_BS[:, :-1])


def test_held_out_windows_do_not_depend_on_the_seed_and_are_never_trained_on(tmp_path):
    config = _config(_numbered(tmp_path / "a", 0, 100))
    data = open_indexed_text(config)
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 6})})
    windows = data.open(config, tmp_path / "one")[1]
    again = data.open(other, tmp_path / "two")[1]
    everything = np.arange(len(windows))
    assert np.array_equal(windows.read(everything).inputs_BS, again.read(everything).inputs_BS)
    assert set(windows.read(everything).inputs_BS.ravel().tolist()) <= _held_out_tokens(data)


# --------------------------------------------------------------------------- cache


def test_an_index_is_built_once_and_again_only_for_other_data(tmp_path):
    config, cache = _config(_numbered(tmp_path / "a", 0, 100)), tmp_path / "cache"
    first = _batches(config, cache).micro_batches(0, 0, 1, BATCH)[0]
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert stamps and not list(cache.glob(".*"))
    again = _batches(config, cache).micro_batches(0, 0, 1, BATCH)[0]
    assert np.array_equal(first.inputs_BS, again.inputs_BS)
    assert stamps == {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    _numbered(tmp_path / "a", 0, 100, seed=2)
    changed = _batches(config, cache).micro_batches(0, 0, 1, BATCH)[0]
    assert not np.array_equal(first.inputs_BS, changed.inputs_BS)


def test_an_index_that_a_kill_left_half_built_is_not_taken_for_one(tmp_path):
    config = _config(_numbered(tmp_path / "a", 0, 100))
    whole = _batches(config, tmp_path / "whole").micro_batches(0, 0, 1, BATCH)[0]
    for folder in (tmp_path / "whole").iterdir():  # as they lie there before the rename
        half = tmp_path / "killed" / f".{folder.name}.12345"
        half.mkdir(parents=True)
        for file in folder.iterdir():
            (half / file.name).write_bytes(file.read_bytes()[:100])
    again = _batches(config, tmp_path / "killed").micro_batches(0, 0, 1, BATCH)[0]
    assert np.array_equal(whole.inputs_BS, again.inputs_BS)


def _refusal(rank: int, world: int, config: RunConfig, cache: str) -> str:
    with pytest.raises(DataError) as refused:
        _batches(config, Path(cache))
    return str(refused.value)


def test_a_cache_that_cannot_be_written_is_one_sentence_on_every_rank(tmp_path):
    (tmp_path / "cache").write_text("a file stands in the way")
    config = _config(_numbered(tmp_path / "a", 0, 100))
    for sentence in run_ranks(2, _refusal, config, str(tmp_path / "cache"), timeout=40):
        assert re.search("cannot be kept in .*cache .*; set data.cache_dir", sentence)


@pytest.mark.parametrize("outside", [300, -1, -2])  # -1 pads at megatron-core, by default
def test_an_id_beyond_the_vocabulary_is_named(outside, tmp_path):
    prefix = write_sequences(tmp_path / "a", [[3, outside] * 90] * 10, np.int32)
    batches = _batches(_config(prefix, vocab_size=256), tmp_path)
    with pytest.raises(DataError, match=f"has the id {outside}, past the vocabulary of 256"):
        batches.micro_batches(0, 0, 1, BATCH)


# ----------------------------------------------------------------------- bad names


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpora) -> Path:
    """Corpora good and bad."""
    path = tmp_path_factory.mktemp("bad")
    for name in ("good", "half", "short", "cut", "no_tokenizer", "other"):
        texts = ["short"] if name == "short" else ["some words of a document, and more of them"] * 40
        write_texts(path / name, texts)
    (path / "half.bin").unlink()
    (path / "cut.bin").write_bytes((path / "cut.bin").read_bytes()[:-1])
    (path / "no_tokenizer.json").unlink()
    (path / "words.txt").write_text("some\nwords\n")
    write_texts(path / "other", ["some words"] * 40, str(path / "words.txt"))
    (path / "raw.txt").write_text("raw text " * 100)
    (path / "empty.idx").write_bytes(b"nothing")
    (path / "empty.bin").write_bytes(b"")
    (path / "both").write_text("raw")
    write_texts(path / "both", ["some words of a document"] * 40)
    return path


@pytest.mark.parametrize(
    ("path", "more", "sentence"),
    [
        ("half", {}, "prepared data .*half has no half.bin"),
        (["good", "nowhere"], {}, "neither .*nowhere.idx nor .*nowhere exists"),
        (["0.5:good", "nowhere"], {}, "neither .*nowhere.idx nor .*nowhere exists"),
        ("cut", {}, "cut.bin has .* bytes .*truncated"),
        ("empty", {}, "empty.idx is not an index"),
        (["0:good", "1:other"], {}, "the weight of .*good is 0; weights of a blend are positive"),
        (["-1:good", "1:other"], {}, "the weight of .*good is -1"),
        (["nan:good", "1:other"], {}, "the weight of .*good is nan"),
        (["1e-9:good", "1:good"], {}, "the weight of .*good is under"),
        (["0.5:good", "good"], {}, "good has no weight while others have"),
        (["good", "other"], {}, "other was made by the tokenizer .*word.*, not by .*bytes"),
        (
            "good",
            {"tokenizer": "words.txt"},
            "good was made by the tokenizer .*bytes.*, not by .*words.txt",
        ),
        (["good", "no_tokenizer"], {}, "no_tokenizer has no .*no_tokenizer.json"),
        (["good", "raw.txt"], {}, "raw.txt is raw text"),
        (["1:raw.txt"], {}, "raw.txt is raw text"),
        (
            "good",
            {"valid_path": "raw.txt"},
            "data.path=.*good and data.valid_path=.*raw.txt one is raw",
        ),
        ("raw.txt", {"valid_path": "good"}, "data.path=.*raw.txt and data.valid_path=.*good one is raw text"),
        ("both", {}, "both is both raw text and a prepared corpus"),
        ([], {}, "data.path is an empty list"),
        ("good", {"split": "100,0,0"}, "data.split=100,0,0 leaves no window of 9 tokens to validate on"),
        ("good", {"split": "0,1"}, "data.split=0,1 is not"),
        ("good", {"split": "most"}, "data.split=most is not"),
        ("short", {}, "short has 6 training tokens .*fewer than the 9 of one window"),
        ("good", {"valid_path": "short"}, "valid_path .*short has no window of 9 tokens"),
        ("good", {"tokenizer": "nothing.model"}, "tokenizer .*nothing.model does not exist"),
    ],
)
def test_what_cannot_work_is_refused_by_name(folder, path, more, sentence):
    def full(text: str) -> str:
        weight, _, name = text.rpartition(":")
        return f"{weight}:{folder / name}" if weight else str(folder / text)

    given = [full(p) for p in path] if isinstance(path, list) else full(path)
    more = {key: value if key == "split" else full(value) for key, value in more.items()}
    with pytest.raises(DataError, match=sentence):
        open_indexed_text(_config(given, **more))


def test_names_that_do_work(folder):
    good = str(folder / "good")
    for path in (good, f"{good}.idx", f"{good}.bin", [good], [f"1:{good}"], [f"0.5:{good}", f".5:{good}"]):
        data = open_indexed_text(_config(path))
        assert {p.path for p in data.train.prefixes} == {good}
        assert data.vocab_size == 257
    assert open_indexed_text(_config(str(folder / "both.idx"))).vocab_size == 257
    assert open_indexed_text(_config(str(folder / "no_tokenizer"), tokenizer="bytes")).vocab_size == 257
    assert open_indexed_text(_config(str(folder / "no_tokenizer"))).vocab_size is None
    assert open_indexed_text(_config(str(folder / "raw.txt"))) is None
    assert open_indexed_text(_config("/nowhere")) is None, "for the reader of raw text to refuse"
    separate = open_indexed_text(_config(good, valid_path=str(folder / "no_tokenizer"), tokenizer="bytes"))
    assert sum(separate.train.tokens) == sum(separate.valid.tokens), "all of each"


def test_nothing_heavy_is_loaded_to_check_names(folder):
    program = (
        "import sys; from vqmoe_ds.config.schema import RunConfig; from vqmoe_ds.data.indexed import open_indexed_text;"
        f"open_indexed_text(RunConfig(model={{'sequence_length': 8}}, data={{'path': {str(folder / 'good')!r}}}));"
        "sys.exit(any(name.split('.')[0] in ('megatron', 'deepspeed') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_split_shares():
    assert split_shares("90,10,0") == ((0.0, 0.9), (0.9, 1.0))
    assert split_shares("3,1") == ((0.0, 0.75), (0.75, 1.0))

"""Whatever lies in ``data.cache_dir``, nothing of it runs, and the windows are those of the data."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.hostile import Evil
from tests.prepared import write_sequences
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.index_cache import SIDECAR, read_array, seal, why_unsound, work_folder
from vqmoe_ds.data.indexed import open_indexed_text
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import own_mark

BATCH = 16


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Two corpora read together, so that all five kinds of arrays are there."""
    rng = np.random.default_rng(0)
    prefixes = [
        write_sequences(tmp_path / name, [rng.integers(0, 99, size) for size in rng.integers(1, 60, count)])
        for name, count in (("a", 60), ("b", 41))
    ]
    model = {"sequence_length": 8, "vocab_size": 99}
    return RunConfig(model=model, train={"batch_size": BATCH, "seed": 5}, data={"path": prefixes, "split": "90,10"})


def _windows(rank: int, world: int, config: RunConfig, cache: str) -> np.ndarray:
    data = open_indexed_text(config)
    batches = data.open(config, Path(cache))[0]
    return np.concatenate([b.inputs_BS for b in batches.micro_batches(0, rank, world, BATCH // world)])


def _windows_here(config: RunConfig, cache: Path) -> np.ndarray:
    """As ``_windows`` of one rank; megatron-core blends corpora in a process group only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _windows(0, 1, config, str(cache))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def cache(config: RunConfig, tmp_path: Path) -> tuple[Path, np.ndarray]:
    return tmp_path / "cache", _windows_here(config, tmp_path / "cache")


def _poison(folder: Path, trap: Path, forged: bool) -> None:
    """Put a pickle in place of each array of a folder; a forger writes a sidecar that fits."""
    arrays = list(folder.glob("*.npy"))
    assert arrays
    for path in arrays:
        path.write_bytes(pickle.dumps(Evil(trap)))
    if forged:
        (folder / SIDECAR).unlink()
        seal(folder)


def test_all_kinds_of_arrays_are_there_and_sealed(cache: tuple[Path, np.ndarray]) -> None:
    kinds = {path.stem.rpartition("-")[2] for path in cache[0].rglob("*.npy")}
    assert kinds == {"document_index", "sample_index", "shuffle_index", "dataset_index", "dataset_sample_index"}
    assert all((folder / SIDECAR).exists() for folder in cache[0].iterdir())


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_pickle_in_an_index_never_runs_and_the_index_is_made_again(forged, world, config, cache, tmp_path) -> None:
    for folder in cache[0].iterdir():
        _poison(folder, tmp_path / "executed", forged)
    again = run_ranks(world, _windows, config, str(cache[0]))
    assert not (tmp_path / "executed").exists()
    assert np.array_equal(np.concatenate(again), cache[1])
    assert all(read_array(path).dtype.kind in "iu" for path in cache[0].rglob("*.npy"))


def test_arrays_of_objects_and_pickles_are_refused_however_they_are_reached(tmp_path: Path) -> None:
    from vqmoe_ds.data.epochs import blended_dataset, gpt_dataset

    trap, path = tmp_path / "executed", tmp_path / "x.npy"
    for module in (gpt_dataset, blended_dataset):
        path.write_bytes(pickle.dumps(Evil(trap)))
        with pytest.raises(DataError, match="is not an array of numbers"):
            module.numpy.load(str(path), allow_pickle=True, mmap_mode="r")
        np.save(path, np.array([Evil(trap)], dtype=object))
        with pytest.raises(DataError, match="is not an array of numbers"):
            module.numpy.load(str(path), allow_pickle=True, mmap_mode="r")
        np.save(path, np.arange(3))
        assert module.numpy.load(str(path), allow_pickle=True, mmap_mode="r").tolist() == [0, 1, 2]
    assert not trap.exists()
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for other in ("link", "pipe"):
        with pytest.raises(DataError, match="not a regular file"):
            read_array(tmp_path / other)


def _remove_sidecar(folder: Path) -> None:
    (folder / SIDECAR).unlink()


def _link(folder: Path) -> None:
    path = next(folder.glob("*shuffle_index.npy"))
    path.rename(folder.parent.parent / "elsewhere.npy")
    path.symlink_to(folder.parent.parent / "elsewhere.npy")


def _link_folder(folder: Path) -> None:
    folder.rename(folder.parent.parent / folder.name)
    folder.symlink_to(folder.parent.parent / folder.name)


def _drop(folder: Path) -> None:
    next(folder.glob("*document_index.npy")).unlink()
    (folder / SIDECAR).unlink()
    seal(folder)


def _plant(folder: Path) -> None:
    (folder / "0-shuffle_index.npy").symlink_to("/etc/passwd")


def _reshape(folder: Path) -> None:
    path = next(folder.glob("*shuffle_index.npy"))
    np.save(path, np.load(path)[:-1])
    (folder / SIDECAR).unlink()
    seal(folder)


def _floats(folder: Path) -> None:
    path = next(folder.glob("*shuffle_index.npy"))
    np.save(path, np.load(path).astype(float))
    (folder / SIDECAR).unlink()
    seal(folder)


def _nested(folder: Path) -> None:
    (folder / SIDECAR).write_text("[" * 100_000)


def _other_format(folder: Path) -> None:
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps({**sidecar, "format": 2}))


@pytest.mark.parametrize(
    "damage",
    [_remove_sidecar, _link, _link_folder, _drop, _plant, _reshape, _floats, _nested, _other_format],
)
def test_an_index_that_is_not_as_it_was_sealed_is_made_again(damage, config, cache) -> None:
    for folder in sorted(cache[0].iterdir()):
        damage(folder)
    assert np.array_equal(_windows_here(config, cache[0]), cache[1])
    if damage is not _link_folder:  # which is left alone, for it may lead anywhere
        assert all((folder / SIDECAR).exists() and not folder.is_symlink() for folder in cache[0].iterdir())
        assert not any(path.is_symlink() for path in cache[0].rglob("*"))


def test_no_flipped_bit_of_any_file_is_taken(cache: tuple[Path, np.ndarray]) -> None:
    rng = random.Random(15)
    folder = min(cache[0].iterdir())
    shapes: dict = {}
    for path in folder.glob("*.npy"):
        shapes.setdefault(path.stem.rpartition("-")[2], []).append(np.load(path).shape)
    assert why_unsound(folder, shapes) is None
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in rng.sample(range(len(whole)), min(60, len(whole))):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            assert why_unsound(folder, shapes) is not None, (path.name, place)
        path.write_bytes(whole)
    assert why_unsound(folder, shapes) is None


def test_processes_of_two_hosts_with_one_number_build_in_folders_of_their_own(tmp_path, monkeypatch) -> None:
    folders = set()
    for host in ("one", "two"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        folders.add(work_folder(tmp_path / "images"))
    assert len(folders) == 2 and all(folder.is_dir() for folder in folders)


def test_what_a_kill_left_behind_is_removed_and_what_others_still_write_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, old = socket.gethostname(), time.time() - 3600
    kept = {f".images.{here}.{os.getppid()}": old, f".images.elsewhere.{ended.pid}": old, f".images.{here}.new": old}
    gone = {f".images.{here}.{ended.pid}": old, f".images.{here}.{1 << 70}": old}
    for name, modified in {**kept, **gone}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-images.npy").write_bytes(b"half")
        for path in (tmp_path / name / "train-images.npy", tmp_path / name):
            os.utime(path, (modified, modified))
    fresh = tmp_path / f".images.{here}.{ended.pid}" / "test-images.npy"
    fresh.touch()
    (tmp_path / ".images-of-others").mkdir()
    work = work_folder(tmp_path / "images")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, fresh.parent.name, ".images-of-others", work.name}
    fresh.unlink()
    os.utime(fresh.parent, (old, old))
    work_folder(tmp_path / "images")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".images-of-others", work.name}


def test_what_others_left_under_the_name_to_build_under_is_not_taken(config, cache, tmp_path) -> None:
    names = [folder.name for folder in cache[0].iterdir()]
    shutil.rmtree(cache[0])
    cache[0].mkdir()
    target = tmp_path / "target"
    target.mkdir()
    for name in names:
        (cache[0] / f".{name}.{own_mark()}").symlink_to(target)
    with pytest.raises(DataError, match="cannot be kept in .*set data.cache_dir"):
        _windows_here(config, cache[0])
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("weight", ["", "0.5:"])
def test_a_corpus_that_is_named_twice_is_read_twice_and_keeps_its_index(weight: str, config, tmp_path) -> None:
    path = [f"{weight}{config.data.path[number]}" for number in (0, 0, 1)]
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": path})})
    twice, _, once = open_indexed_text(config).train.windows
    epoch = config.train.model_copy(update={"batch_size": 2 * twice + once})
    config = config.model_copy(update={"train": epoch})
    windows = _windows_here(config, tmp_path / "cache")
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    assert np.array_equal(_windows_here(config, tmp_path / "cache"), windows)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")} == stamps
    counts = np.unique(windows, axis=0, return_counts=True)[1]
    assert weight or (np.bincount(counts)[1:].tolist() == [once, twice])


def _lie_about_lengths(index: Path) -> None:
    raw = bytearray(index.read_bytes())
    lengths = np.frombuffer(raw, np.int32, 60, offset=34).copy()
    lengths[:2] += (1000, -1000)
    raw[34 : 34 + lengths.nbytes] = lengths.tobytes()
    index.write_bytes(raw)


def test_lengths_that_would_lead_compiled_code_astray_are_refused(config: RunConfig, tmp_path: Path) -> None:
    data = open_indexed_text(config)
    _lie_about_lengths(tmp_path / "a.idx")
    with pytest.raises(DataError, match="a.idx: sequence . points past the end of the .bin"):
        open_indexed_text(config)
    # Also where the file changed after it was looked at.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(DataError, match="a.idx has sequences of fewer than no tokens"):
            data.open(config, tmp_path / "cache")[0].micro_batches(0, 0, 1, BATCH)
    finally:
        dist.destroy_process_group()


FORGED = [
    *((kind, value) for kind in ("document_index", "shuffle_index") for value in (-1, 10**6)),
    *(("sample_index", value) for value in (-1, 10**6, 3)),
    *((kind, value) for kind in ("dataset_index", "dataset_sample_index") for value in (-1, 100)),
]


@pytest.mark.parametrize("kind, value", FORGED)
def test_forged_values_that_lead_nowhere_are_a_sentence(kind: str, value: int, config, cache) -> None:
    """Whoever forges values forges the sidecar too; left alone, they were numpy's IndexError."""
    for path in sorted(cache[0].rglob(f"*-{kind}.npy")):
        array = np.load(path).astype(np.int64)
        array.flat[-1] = value
        np.save(path, array)
        (path.parent / SIDECAR).unlink()
        seal(path.parent)
    with pytest.raises(DataError, match="is not that of its data; remove it"):
        _windows_here(config, cache[0])


# ------------------------------------------------------------------ what stays


def _run_on(
    rank: int, world: int, config: RunConfig, cache: str, first: int, batches: int
) -> list[tuple[np.ndarray, list[str]]]:
    """Inputs of the batches from sample ``first`` on, and after each the names of the folders that are there."""
    stream = open_indexed_text(config).open(config, Path(cache))[0]
    found = []
    for start in range(first, first + batches * BATCH, BATCH):
        inputs = np.concatenate([b.inputs_BS for b in stream.micro_batches(start, rank, world, BATCH // world)])
        dist.barrier()
        found.append((inputs, sorted(path.name for path in Path(cache).iterdir())))
        dist.barrier()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_epochs_that_are_over_do_not_stay(world: int, config: RunConfig, tmp_path: Path) -> None:
    """And a resume from a checkpoint in one of them reads what it would have read."""
    windows = len(open_indexed_text(config).train)
    count = 4 * windows // BATCH
    there = run_ranks(world, _run_on, config, str(tmp_path / "index"), 0, count)
    assert count > 40
    epochs = [{int(name.rpartition("-")[2]) for name in names if "-5-0-" in name} for _, names in there[0]]
    assert max(map(len, epochs)) == 2 and set.union(*epochs) == {0, 1, 2, 3}
    for number, present in enumerate(epochs):
        first, last = number * BATCH // windows, ((number + 1) * BATCH - 1) // windows
        assert present == {first, last}
    held_out = [name for name in there[0][-1][1] if name.endswith("-0-0-0")]
    assert len(held_out) == 1, "what is validated on stays"
    for sample in (0, windows // BATCH * BATCH, 20 * BATCH):
        again = run_ranks(world, _run_on, config, str(tmp_path / "index"), sample, 3)
        for rank in range(world):
            for (inputs, _), (before, _) in zip(again[rank], there[rank][sample // BATCH :], strict=False):
                assert np.array_equal(inputs, before)


def test_a_folder_that_the_user_named_keeps_what_other_runs_may_read(config: RunConfig, tmp_path: Path) -> None:
    data = config.data.model_copy(update={"cache_dir": str(tmp_path / "index")})
    config = config.model_copy(update={"data": data})
    windows = len(open_indexed_text(config).train)
    (there,) = run_ranks(1, _run_on, config, str(tmp_path / "index"), 0, 2 * windows // BATCH)
    assert {name.rpartition("-")[2] for name in there[-1][1] if "-5-0-" in name} == {"0", "1"}

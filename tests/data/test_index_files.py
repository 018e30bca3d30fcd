"""The indexed files: what Megatron's builder writes is read, what is damaged is refused before any long work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vqmoe_ds.data.index_files import DTYPES, HashedFile, check_prefix, chunks, smallest_dtype, write_index
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import sha256_of

LENGTHS, ENDS = np.array([3, 2, 4, 1], np.int32), np.array([1, 3, 4])


def make(prefix: Path, dtype: type = np.uint16) -> Path:
    """Ten tokens in four sequences of three documents."""
    with HashedFile(f"{prefix}.bin") as data:
        data.write(np.arange(10, dtype=dtype))
    with HashedFile(f"{prefix}.idx") as index:
        write_index(index, np.dtype(dtype), 4, 3, lambda: np.array_split(LENGTHS, 2), lambda: [ENDS[:1], ENDS[1:]])
    assert index.sha256 == sha256_of(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_header_and_arrays_come_back(dtype, tmp_path):
    header = check_prefix(str(make(tmp_path / "d", dtype)))
    assert (header.sequences, header.documents, header.tokens, header.dtype) == (4, 3, 10, dtype)
    assert header.lengths.tolist() == LENGTHS.tolist() and header.ends.tolist() == [0, *ENDS]
    assert header.offsets.tolist() == [n * header.dtype.itemsize for n in (0, 3, 5, 9)]
    assert header.ids.tolist() == list(range(10))
    assert [chunk.tolist() for chunk in chunks(header.lengths, 3)] == [[3, 2, 4], [1]]


def test_bytes_are_those_of_megatrons_builder(tmp_path):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for tokens, lengths in (([0, 1, 2], [3]), (range(3, 9), [2, 4]), ([9], [1])):
        builder.add_document(np.array(tokens), lengths)
    builder.finalize(str(tmp_path / "m.idx"))
    make(tmp_path / "d")
    for name in ("bin", "idx"):
        assert sha256_of(tmp_path / f"d.{name}") == sha256_of(tmp_path / f"m.{name}")
    assert check_prefix(str(tmp_path / "m")).documents == 3
    data = IndexedDataset(str(tmp_path / "d"))  # named, as its arrays are views that end with it
    assert [sequence.tolist() for sequence in data[1:3]] == [[3, 4], [5, 6, 7, 8]]
    for size in (256, 257, 65499, 65500, 65535, 65536, 250_000):
        assert smallest_dtype(size) == DType.optimal_dtype(size)


@pytest.mark.parametrize("mode", [0, 1])
def test_files_with_modes_are_read_if_all_is_text(tmp_path, mode):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), multimodal=True)
    builder.add_document(np.array([1, 2]), [2], [0])
    builder.add_document(np.array([1, 2]), [2], [mode])
    builder.finalize(str(tmp_path / "m.idx"))
    if mode == 0:
        assert check_prefix(str(tmp_path / "m")).tokens == 4
        return
    with pytest.raises(DataError, match="is of a multimodal preparation"):
        check_prefix(str(tmp_path / "m"))


def test_damage_is_named(tmp_path):
    whole = {name: Path(f"{make(tmp_path / 'd')}.{name}").read_bytes() for name in ("bin", "idx")}
    bin_, idx = whole["bin"], whole["idx"]
    cases = [
        ({"bin": bin_[:-1]}, r"d\.bin has 19 bytes and d\.idx points to 20: the \.bin is truncated"),
        ({"bin": bin_ + b"x"}, r"d\.bin has 21 bytes but d\.idx ends at 20: they are not of one preparation"),
        ({"idx": b"x" + idx[1:]}, r"d\.idx is not an index of Megatron's IndexedDataset"),
        ({"idx": idx[:20]}, r"d\.idx is truncated within its header"),
        ({"idx": idx[:-8]}, r"d\.idx has 106 bytes where 4 sequences and 3 documents take 114; it is truncated"),
        ({"idx": idx[:9] + b"\x02" + idx[10:]}, r"d\.idx has version 2 and number type 8"),
        ({"idx": idx[:17] + b"\x09" + idx[18:]}, r"d\.idx has version 1 and number type 9"),
        ({"idx": idx[:-8] + b"\x03" + idx[-7:]}, r"its documents do not end with its last sequence"),
        ({"idx": None}, r"data .*d has no d\.idx; give the path without \.bin or \.idx"),
        ({"bin": None, "idx": None}, r"has no d\.idx and no d\.bin"),
    ]
    for damage, message in cases:
        for name, content in {**whole, **damage}.items():
            path = tmp_path / f"d.{name}"
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            check_prefix(str(tmp_path / "d"))
    (tmp_path / "d.parts").mkdir()
    with pytest.raises(DataError, match=r"the preparation of .*d did not finish; run its tools/prepare_data.py"):
        check_prefix(str(tmp_path / "d"))


def test_the_check_needs_neither_torch_nor_megatron(tmp_path):
    make(tmp_path / "d")
    code = (
        "import sys; from vqmoe_ds.data.index_files import check_prefix; "
        f"check_prefix({str(tmp_path / 'd')!r}); "
        "assert not {'torch', 'megatron', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])

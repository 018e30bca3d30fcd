"""Reads past the system's page cache: the same bytes from any place, and False where there are none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vqmoe_ds.checkpoint.io.direct import read_past_cache

MIB = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "bytes"
    path.write_bytes(os.urandom(3 * MIB + 1001))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no reads past the cache")
    return path


@pytest.mark.parametrize("offset", [0, 1, 511, 4096, MIB - 1, MIB + 8, 3 * MIB - 3])
@pytest.mark.parametrize("length", [0, 1, 1000, 4096, MIB, 2 * MIB + 7])
def test_the_bytes_are_those_of_the_file(file, offset, length):
    content = file.read_bytes()[offset : offset + length]
    out = torch.zeros(length, dtype=torch.uint8)
    found = read_past_cache(str(file), offset, out)
    assert found == (len(content) == length), "whatever reaches past the end is not there"
    assert not found or bytes(out.tolist()) == content


def test_values_of_any_type_are_read(file):
    values = torch.frombuffer(bytearray(file.read_bytes()[24:10_024]), dtype=torch.int16)
    out = torch.zeros(5000, dtype=torch.bfloat16)
    assert read_past_cache(str(file), 24, out) and torch.equal(out.view(torch.int16), values)


def test_what_is_no_file_of_bytes_is_left_to_the_usual_way(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "fifo", "", "."):
        assert not read_past_cache(str(tmp_path / name), 0, torch.zeros(8))
    assert not read_past_cache("/proc/self/status", 0, torch.zeros(8)), "a file system without such reads"

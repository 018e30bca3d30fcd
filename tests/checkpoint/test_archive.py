"""A ``.pt`` file cannot make its reader run, allocate, hang or change anything that is not the file's own."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from vqmoe_ds.checkpoint.io import archive
from vqmoe_ds.checkpoint.io.archive import LONGEST_PICKLE, OPCODES, Record, Stored, load_archive
from vqmoe_ds.runtime.errors import CheckpointError

_LIMITED = """
import os, resource, sys, time
from pathlib import Path
from vqmoe_ds.checkpoint.io.archive import load_archive
from vqmoe_ds.runtime.errors import CheckpointError
for path in sys.argv[1:]:
    if child := os.fork():  # the most memory of a process is its own, from its fork on
        assert os.waitpid(child, 0)[1] == 0, path
        continue
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    try:
        load_archive(Path(path))
        said = "loaded"
    except CheckpointError as error:
        said = str(error)
    assert time.monotonic() - start < 60, "hangs"
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, said, flush=True)
    os._exit(0)
"""


def write(path: Path, payload: bytes, **records: bytes) -> Path:
    """A file as torch.save lays it out, with a pickle of anybody's."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("x/data.pkl", payload)
        file.writestr("x/byteorder", b"little")
        file.writestr("x/version", b"3\n")
        for name, content in (records or {"0": bytes(16)}).items():
            file.writestr(f"x/data/{name}", content)
    return path


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def call(module: str, name: str, *args: bytes) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def storage(numel: bytes, key: bytes | None = None, dtype: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + dtype + (text("0") if key is None else key) + text("cpu") + numel + b"tQ"


def number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(store: bytes, shape: bytes, stride: bytes, start: bytes = b"K\x00") -> bytes:
    return call("torch._utils", "_rebuild_tensor_v2", store, start, shape, stride, b"\x89", b"}")


NAN = b"G" + struct.pack(">d", float("nan"))
FOUR = storage(number(4))
LAUGH = b"]q\x00" + b"".join(b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 10 + b"e" for i in range(30))
LAUGHING_TUPLE = b")q\x00" + b"".join(
    b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
)

HARMLESS = {
    "memo index": b"Nr" + struct.pack("<I", (1 << 32) - 1) + b".",
    "memo indices": b"".join(b"Nr" + struct.pack("<I", 1 << bits) + b"0" for bits in range(32)) + b"N.",
    "frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
}
HOSTILE = {
    "bytes of 2^60": b"\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "text of 2^60": b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "bytearray of 2^36": b"\x96" + struct.pack("<Q", 1 << 36) + b".",
    "integer of 2^31 digits": b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
    "integer of 255 bytes": b"\x8a\xff" + b"\x7f" * 255 + b".",
    "lists within each other": b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples within each other": b")" + b"\x85" * 100_000 + b".",
    "few lists that are many": LAUGH + b".",
    "few tuples that are many": LAUGHING_TUPLE + b".",
    "a list within itself": b"]q\x00h\x00a.",
    "a key that hashes for ever": b"}" + LAUGHING_TUPLE.replace(b"}", b"") + b"Ns.",
    "a storage's key without end": storage(number(4), key=LAUGH) + b".",
    "an attribute without end": call("__builtin__", "getattr", b"N", LAUGH) + b".",
    "a storage of NaN": storage(NAN) + b".",
    "a storage of more than the file": storage(number(5)) + b".",
    "a storage of text": storage(text("4")) + b".",
    "a storage of no type": storage(number(4), dtype=b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n") + b".",
    "a storage that is not there": storage(number(4), key=text("7")) + b".",
    "strides of 0": tensor(FOUR, numbers(1 << 40), numbers(0)) + b".",
    "strides of 0 and 1": tensor(FOUR, numbers(1 << 20, 4), numbers(0, 1)) + b".",
    "a start of NaN": tensor(FOUR, numbers(1 << 40), numbers(1), NAN) + b".",
    "a start before the file": tensor(FOUR, numbers(4), numbers(1), number(-4)) + b".",
    "a shape of text": tensor(FOUR, b"(" + text("4") + b"t", numbers(1)) + b".",
    "a shape of many dimensions": tensor(FOUR, b"(" + b"K\x01" * 100_000 + b"t", b"(" + b"K\x01" * 100_000 + b"t")
    + b".",
    "a shape past 64 bits": tensor(FOUR, numbers(1 << 64), numbers(1)) + b".",
    "attributes of a class": b"cdeepspeed.utils.tensor_fragment\nfragment_address\n(N}" + text("args") + b"Nstb.",
    "slots of a class": b"ctorch\nTensor\nN}" + text("__init__") + b"Ns\x86b.",
    "attributes of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("x") + b"Nsb.",
    "slots of a function": b"ctorch._utils\n_rebuild_parameter\nN}" + text("__defaults__") + b")s\x86b.",
    "attributes of a type": b"ctorch\nFloatStorage\n}" + text("itemsize") + b"K\x01sb.",
    "attributes of a dict": b"}}" + text("get") + b"Nsb.",
    "attributes of a tensor": tensor(FOUR, numbers(4), numbers(1)) + b"}" + text("path") + text("/etc/shadow") + b"sb.",
    "items of a class": b"ctorch\nTensor\nNNs.",
    "appending to a record": call("torch", "Tensor") + b"}" + text("append") + b"ctorch\nSize\nsbNa.",
    "an object of another class": b"ccollections\nOrderedDict\n)\x81.",
    "calling a type": b"ctorch\nFloatStorage\n)R.",
    "calling itself": call(
        "torch._tensor", "_rebuild_from_type_v2", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"N", b")", b"N"
    )
    + b".",
    "an instance by name": b"(i" + b"os\nsystem\n.",
    "an object of the marked": b"(cos\nsystem\no.",
    "an extension": b"\x82\x01.",
    "an old persistent name": b"Pfile\n.",
    "nothing": b"",
    "no end": b"N",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_checkpoint_needs_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", HOSTILE[name])
    before = dict(vars(Record))
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        load_archive(path)
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert dict(vars(Record)) == before, "the next file meets the same class"


def test_nothing_is_allocated_for_the_asking(tmp_path: Path) -> None:
    names = [*HARMLESS, "bytearray of 2^36", "strides of 0", "few lists that are many"]
    files = [write(tmp_path / f"{name}.pt", {**HOSTILE, **HARMLESS}[name]) for name in names]
    for name, (kilobytes, _) in zip(names, _limited(*files), strict=True):
        assert kilobytes < 50_000, name


def _limited(*paths: Path) -> list[tuple[int, str]]:
    """Kilobytes that each file took to read, and what was said of it."""
    command = [sys.executable, "-c", _LIMITED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-500:]
    answers = [line.partition(" ") for line in done.stdout.splitlines()]
    return [(int(kilobytes), said) for kilobytes, _, said in answers]


@pytest.mark.parametrize("share", [16, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", [b"]", b")\x85"], ids=["lists", "tuples"])
def test_the_largest_pickle_stays_under_a_gigabyte(unit: bytes, share: int, tmp_path: Path) -> None:
    """And a sixteenth of it under a sixteenth of that: the memory grows with the pickle, and not faster."""
    begin = b"ccollections\nOrderedDict\nq\x00("
    count = (LONGEST_PICKLE // share - len(begin) - 2) // len(unit)
    [(kilobytes, said)] = _limited(write(tmp_path / "x.pt", begin + unit * count + b"t."))
    assert kilobytes < (1 << 20) // share, said


def test_a_pickle_or_a_directory_past_its_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.pt", b"N" * 1000)
    monkeypatch.setattr(archive, "LONGEST_PICKLE", 999)
    with pytest.raises(CheckpointError, match=r"its record x/data.pkl has 1000 bytes"):
        load_archive(path)
    monkeypatch.setattr(archive, "LONGEST_DIRECTORY", 100)
    with pytest.raises(CheckpointError, match="the directory of its records claims .* bytes"):
        load_archive(path)


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"N" * (1 << 24))
    with pytest.raises(CheckpointError, match="is compressed or of a mismatched size"):
        load_archive(tmp_path / "x.pt")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        load_archive(tmp_path / "x.pt")


def test_what_torch_and_deepspeed_write_is_read(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False)
    state: OrderedDict[str, Any] = OrderedDict(weight=torch.arange(6.0).view(2, 3).t(), none=None, big=1 << 62)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    tree = {
        "module": state,
        "scaler": scaler,
        "place": fragment_address(7, 8),
        "size": torch.Size([3, 4]),
        5: [1.5, True],
    }
    for protocol in (2, 3, 4):
        torch.save(tree, tmp_path / "x.pt", pickle_protocol=protocol)
        read = load_archive(tmp_path / "x.pt")
        assert torch.equal(read["module"]["weight"].whole(), state["weight"])
        assert (read["module"]["none"], read["module"]["big"]) == (None, 1 << 62)
        assert read["scaler"].cur_scale == 2.0**16 and read["place"].start == 8
        assert (read["size"], read[5]) == ((3, 4), [1.5, True])


def test_random_pickles_end_in_a_sentence_or_in_data(tmp_path: Path) -> None:
    """2,000 mutations of a sound pickle and of random opcodes, of every kind that is read."""
    rng, payload = random.Random(15), io.BytesIO()
    torch.save({"a": torch.zeros(4), "b": [torch.Size([2]), OrderedDict(c=1.5)]}, payload)
    with zipfile.ZipFile(payload) as file:
        sound = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    kept = 0
    for _ in range(2000):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 2)] = rng.choices(OPCODES, k=rng.randint(0, 2))
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            _check_inert(load_archive(write(tmp_path / "x.pt", bytes(data))))
            kept += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
    assert kept > 20, "some mutations are harmless"


def _check_inert(thing: Any) -> None:
    if isinstance(thing, Stored):
        assert thing.numel <= 4
    elif type(thing) in (dict, OrderedDict):
        for part in thing.values():
            _check_inert(part)
    elif type(thing) in (list, tuple):
        for part in thing:
            _check_inert(part)
    elif type(thing) is Record:
        _check_inert(dict(vars(thing)))


def test_every_opcode_read_is_one_of_pythons() -> None:
    assert set(archive._Unpickler.dispatch) == set(OPCODES) <= set(pickle._Unpickler.dispatch)
    assert {pickle.BYTEARRAY8[0], pickle.INST[0], pickle.OBJ[0], pickle.EXT1[0], pickle.LONG4[0]}.isdisjoint(OPCODES)

"""Checkpoints that claim more than they hold: refused before anything of that size is built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.evaluation.routed_models import model_of
from tests.huggingface import ModelReader
from vqmoe_ds.checkpoint.convert import build_parser, convert
from vqmoe_ds.checkpoint.formats.portable import STATE, write_portable
from vqmoe_ds.checkpoint.io.safetensors_io import read_header
from vqmoe_ds.checkpoint.io.store import read_manifest, tag_name, verify, why_not_whole, write_manifest
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.resume.restricted import without_pickles
from vqmoe_ds.runtime import memory
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import new_folder

BILLION = 10**9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with new_folder(tmp_path / "model", False) as into:
        write_portable(ModelReader(model_of("vq")), into)
    return tmp_path / "model"


def _claim(folder: Path, **changes: int) -> None:
    """Forge values of the configuration, checksums and all."""
    state = json.loads((folder / STATE).read_text())
    for name, value in changes.items():
        section, _, field = name.partition("_")
        state["config"][section][field] = value
    (folder / STATE).write_text(json.dumps(state))
    write_manifest(folder, {**read_manifest(folder), "config": state["config"]})


@pytest.mark.parametrize(
    "changes",
    [
        {"model_layers": BILLION},
        {"model_layers": 40},
        {"model_vocab_size": BILLION},
        {"model_width": 1 << 20},
        {"moe_num_experts": BILLION},
        {"moe_expert_hidden": BILLION},
        {"codebook_num_codes": BILLION},
        {"codebook_code_dim": BILLION},
        {"model_sequence_length": BILLION},
        {"model_head_width": BILLION},
    ],
)
def test_what_a_configuration_claims_is_not_built(changes: dict[str, int], folder: Path, tmp_path: Path) -> None:
    _claim(folder, **changes)
    started = time.monotonic()
    with pytest.raises(CheckpointError):
        load_model(folder)
    if "model_layers" in changes:
        for target in ("megatron", "hf", "portable"):
            with pytest.raises(CheckpointError, match="model.layers=.* tensors|holds another model|is missing"):
                convert(build_parser("").parse_args([str(folder), str(tmp_path / "new"), "--to", target]))
                load_model(tmp_path / "new")
    assert time.monotonic() - started < 10


def test_a_model_larger_than_memory_is_refused_with_both_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    with pytest.raises(
        CheckpointError, match=r"the model of .* needs 0.0 GiB of memory, this machine has 0.0 GiB left"
    ):
        load_model(folder)
    monkeypatch.undo()
    load_model(folder)


def test_a_tensor_made_of_a_hole_in_its_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    count = 1 << 38
    header = json.dumps({"x": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 4 * count)
    with pytest.raises(CheckpointError, match=r"x.safetensors needs 1,024.0 GiB of memory, this machine has"):
        read_header(path)["x"].whole()


def test_folders_below_a_tag_may_be_as_deep_as_they_like(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = folder.with_name(tag_name(7))
    folder.rename(tag)
    monkeypatch.chdir(tag)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tag)
    try:
        assert why_not_whole(tag) is None
        verify(tag)
        open_checkpoint(tag)
    finally:
        subprocess.run(["rm", "-rf", str(tag / "d")], check=True)


def _link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def test_what_stands_in_the_place_of_a_file_is_never_waited_for(folder: Path) -> None:
    for name in sorted(path.name for path in folder.iterdir()):
        whole = folder.parent / "whole"
        (folder / name).rename(whole)
        for make in (os.mkfifo, _link_to_zeros, _link_to_itself, os.mkdir):
            make(folder / name)
            with pytest.raises(CheckpointError):
                verify(folder)
            with pytest.raises(CheckpointError):
                load_model(folder)
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        whole.rename(folder / name)
    load_model(folder)


def test_links_to_files_are_followed_as_in_the_hubs_cache(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            path.rename(folder.parent / path.name)
            path.symlink_to(folder.parent / path.name)
    load_model(folder)


@pytest.mark.parametrize("damage", [50, 200, -30])
def test_a_damaged_zip_that_deepspeed_loads_is_a_sentence(damage: int, tmp_path: Path) -> None:
    """fp16 is left to DeepSpeed's own ``torch.load``, which raised PyTorch's RuntimeError."""
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(40)}, path)
    path.write_bytes(path.read_bytes()[:damage])
    with pytest.raises(CheckpointError, match="a file of the checkpoint is damaged"), without_pickles():
        torch.load(path, weights_only=False)
    with pytest.raises(RuntimeError, match="of the engine"), without_pickles():
        raise RuntimeError("of the engine")

"""``tools/convert_checkpoint.py``: every format and layout, exact, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.convert import Grown
from tests.checkpoint.layouts import MODEL, Layout, Training, load_natively, move, write_sources
from tests.checkpoint.test_restore import assert_equal_state
from tests.distributed import run_ranks
from vqmoe_ds.checkpoint.convert import build_parser, main
from vqmoe_ds.checkpoint.formats.deepspeed.writer import bytes_told, write_tag
from vqmoe_ds.checkpoint.formats.deepspeed.zero import TagLayout
from vqmoe_ds.checkpoint.formats.portable import total_bytes, write_portable
from vqmoe_ds.checkpoint.io.archive import load_archive
from vqmoe_ds.checkpoint.io.safetensors_io import read_header
from vqmoe_ds.checkpoint.io.store import read_manifest, verify, write_manifest
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.runtime.errors import CheckpointError, UserError
from vqmoe_ds.runtime.files import new_folder

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Layout(2, 2, 2)
STEPS = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    losses = run_ranks(2, write_sources, str(folder), [SOURCE], STEPS)[0]
    return folder, folder / str(SOURCE), losses[SOURCE]


@pytest.fixture(scope="module")
def portable(run):
    assert convert(run[1], run[0] / "portable", "--to", "portable") == 0
    return run[0] / "portable"


def convert(src: Path, dst: Path, *options: str) -> int:
    return main(build_parser("").parse_args([str(src), str(dst), *options]))


def sentence(capsys: Any) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


# ------------------------------------------------------------------ exactness


def test_portable_is_bit_exact_and_verifies(run, portable):
    reader = open_checkpoint(portable)
    assert reader.kind == "portable"
    assert_equal_state(open_checkpoint(run[1]), reader)
    assert reader.client_state["vqmoe_ds"]["step"] == reader.step
    assert verify(portable)["step"] == reader.step
    assert not list(portable.parent.glob(".*"))


def test_portable_weights_are_plain_safetensors(run, portable):
    from safetensors.torch import load_file

    weights = load_file(portable / "model-00001-of-00001.safetensors")
    assert all(torch.equal(open_checkpoint(run[1]).tensor(name), weight) for name, weight in weights.items())


def test_portable_in_many_shards_is_the_same(run, tmp_path):
    assert convert(run[1], tmp_path / "p", "--to", "portable", "--max_shard", "10KB") == 0
    assert len(list((tmp_path / "p").glob("model-*"))) > 3
    assert_equal_state(open_checkpoint(run[1]), open_checkpoint(tmp_path / "p"))


LAYOUTS = [
    *(Layout(0, 1, 1), Layout(0, 4, 4), Layout(1, 1, 3), Layout(1, 2, 4), Layout(2, 4, 8), Layout(2, 1, 5)),
    *(Layout(3, 1, 1), Layout(3, 4, 8), Layout(3, 2, 6), Layout(0, 2, 2, "bf16"), Layout(2, 2, 4, "bf16")),
    Layout(3, 1, 7, "bf16"),
]


def _options(layout: Layout) -> list[str]:
    return [
        *("--to", "deepspeed", "--zero", str(layout.stage), "--ep", str(layout.ep), "--world", str(layout.world)),
        *("--precision", layout.precision),
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_deepspeed_tag_of_any_layout_is_bit_exact(layout, run, portable, tmp_path):
    assert convert(portable, tmp_path / "moved", *_options(layout)) == 0
    tag = open_checkpoint(tmp_path / "moved")
    assert tag.layout == {
        **{"world_size": layout.world, "ep_size": layout.ep, "zero_stage": layout.stage},
        "precision": layout.precision,
    }
    assert_equal_state(open_checkpoint(run[1]), tag)
    assert tag.counters == open_checkpoint(run[1]).counters
    assert convert(tmp_path / "moved", tmp_path / "back", "--to", "portable", "--verify") == 0
    assert_equal_state(open_checkpoint(run[1]), open_checkpoint(tmp_path / "back"))


@pytest.mark.parametrize("layout", [TagLayout(0, 2, 4), TagLayout(2, 1, 2, "bf16"), TagLayout(3, 4, 4)])
def test_progress_ends_where_it_said(layout, run, portable, tmp_path):
    told = []
    write_tag(open_checkpoint(portable), tmp_path, layout, told.append)
    assert sum(told) == bytes_told(open_checkpoint(portable), layout)
    (tmp_path / "p").mkdir()
    told.clear()
    write_portable(open_checkpoint(portable), tmp_path / "p", told.append)
    assert sum(told) == total_bytes(open_checkpoint(portable))


def test_a_group_smaller_than_its_ranks_is_padded_as_deepspeed_pads_it(portable, tmp_path):
    reader = open_checkpoint(portable)
    write_tag(reader, tmp_path, TagLayout(1, 1, 64))
    shards = [load_archive(path)["optimizer_state_dict"] for path in tmp_path.glob("zero_pp_rank_*")]
    assert len(shards) == 64
    vectors = sum(math.prod(shape) for shape in reader.shapes.values() if len(shape) < 2)
    held = [shard["single_partition_of_fp32_groups"][1].numel for shard in shards]
    assert vectors < 63 * max(held) and sum(held) == vectors
    assert all(shard["group_paddings"][1] == max(held) - there for shard, there in zip(shards, held, strict=True))


NATIVE = [
    *(Layout(0, 2, 2), Layout(1, 1, 2), Layout(2, 1, 2), Layout(3, 2, 2)),
    *(Layout(0, 2, 2, "bf16"), Layout(3, 1, 2, "bf16")),
]


def test_deepspeed_itself_loads_what_was_written(run, portable):
    for layout in NATIVE:
        assert convert(portable, run[0] / f"native-{layout}", *_options(layout), "--force") == 0
    tags = [(f"native-{layout}", layout) for layout in NATIVE]
    losses = run_ranks(2, load_natively, str(run[0]), tags, STEPS)[0]
    moved = run_ranks(2, move, str(run[0]), [("portable", layout) for layout in NATIVE], STEPS)[0]
    for layout, native, ours in zip(NATIVE, losses, moved, strict=True):
        assert native == ours, layout
        assert native == pytest.approx(run[2], abs=1e-5 if layout.precision == "fp32" else 0.02)


# ------------------------------------------------------------------ discrete only


def _discrete(rank: int, world: int, folder: str, path: str) -> dict[str, Any]:
    changes = {"moe.top_k": 0, "codebook.learning": "frozen"}
    training = Training(folder, Layout(2, 2, 2), rank, **changes)
    training.restore(path)
    before = training.session.model.bank.codes_LKC.clone()
    losses = training.train(STEPS)
    return {"losses": losses, "still": torch.equal(before, training.session.model.bank.codes_LKC)}


def test_discrete_only_drops_the_continuous_path_and_freezes_the_codes(run, tmp_path, capsys):
    assert convert(run[1], tmp_path / "discrete", "--to", "discrete-only") == 0
    told = capsys.readouterr().out
    source, reader = open_checkpoint(run[1]), open_checkpoint(tmp_path / "discrete")
    gone = set(source.names()) - set(reader.names())
    assert gone and all(".router." in name for name in gone)
    assert not reader.has_optimizer
    assert reader.config["moe"]["top_k"] == 0 and reader.config["codebook"]["learning"] == "frozen"
    width, layers, experts = 16, 2, 4
    dropped = layers * (experts * width + 2 * width + 2)
    one_expert = layers * 3 * 12 * width
    stored = sum(math.prod(shape) for shape in source.shapes.values())
    assert f"parameters stored: {stored:,} before, {stored - dropped:,} after" in told
    saved_flops = 2 * (one_expert + layers * (experts * width + 2 * width))
    numbers = [int(part.replace(",", "")) for part in told.splitlines()[-1].split() if part[0].isdigit()][:2]
    assert numbers[0] - numbers[1] == saved_flops
    answers = run_ranks(2, _discrete, str(tmp_path), str(tmp_path / "discrete"))
    assert all(answer["still"] and math.isfinite(answer["losses"][-1]) for answer in answers)
    assert answers[0]["losses"][-1] < 5


def test_discrete_only_keeps_the_width_of_dense_blocks():
    from vqmoe_ds.checkpoint.views.discrete import discrete_config

    config = load_config("tiny", None, {**MODEL, "model.moe_every": 2}).config.model_dump(mode="json")
    assert discrete_config(config)["model"]["dense_hidden"] == 2 * MODEL["moe.expert_hidden"]


# ------------------------------------------------------------------ whole or not at all


def test_a_destination_is_never_overwritten_without_force(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    assert convert(run[1], tmp_path / "mine", "--to", "portable") == 2
    assert "exists; choose another folder, or give --force" in sentence(capsys)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert convert(run[1], tmp_path / "mine", "--to", "portable", "--force") == 0
    assert open_checkpoint(tmp_path / "mine").kind == "portable"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_source_cannot_be_the_destination(run, capsys):
    assert convert(run[1], run[1], "--to", "portable", "--force") == 2
    assert "holds the checkpoint that is to be converted" in sentence(capsys)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_was_interrupted_leaves_nothing(stop, run, tmp_path):
    def tell(count: int) -> None:
        raise stop

    (tmp_path / "old").mkdir()
    for name, force in (("new", False), ("old", True)):
        with (
            pytest.raises((KeyboardInterrupt, CheckpointError)),
            new_folder(tmp_path / name, force) as folder,
        ):
            write_portable(open_checkpoint(run[1]), folder, tell)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("target", ["portable", "deepspeed"])
def test_what_a_manifest_vouches_for_is_flushed_to_disk(target, run, tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: flushed.add(os.fstat(number).st_ino) or fsync(number))
    assert convert(run[1], tmp_path / "x", "--to", target) == 0
    files = [path for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert files and not [path.name for path in files if path.stat().st_ino not in flushed]


def test_force_replaces_a_link_and_not_what_it_leads_to(run, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "mine").symlink_to("theirs")
    assert convert(run[1], tmp_path / "mine", "--to", "portable", "--force") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "theirs"]
    assert not (tmp_path / "mine").is_symlink() and not list((tmp_path / "theirs").iterdir())


def test_what_is_replaced_comes_back_where_the_new_folder_cannot_take_its_name(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match="nothing was left behind"), new_folder(tmp_path / "mine", True) as folder:
        folder.rmdir()  # so that it cannot be renamed
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and (tmp_path / "mine" / "thesis.tex").exists()


def test_what_is_replaced_and_cannot_be_removed_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or os.rmdir(path / "no"))
    wanted = r"mine is written, but \S+\.old, which it replaces, cannot be removed"
    with pytest.raises(CheckpointError, match=wanted), new_folder(tmp_path / "mine", True):
        pass
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize(
    "options, part",
    [
        (["--ep", "3", "--world", "3"], "--ep 3 does not divide the 4 experts"),
        (["--ep", "2", "--world", "3"], "--ep 2 does not divide --world 3"),
        (["--world", "-1", "--ep", "1"], "--world -1 is no number of ranks; give 1 or more"),
        (["--ep", "0"], "--ep 0 is no number of ranks; give 1 or more"),
        (["--to", "megatron", "--ep", "0"], "--ep 0 does not divide the 4 experts"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, part, run, tmp_path, capsys):
    assert convert(run[1], tmp_path / "x", "--to", "deepspeed", *options) == 2
    assert part in sentence(capsys)
    assert not list(tmp_path.iterdir())


def test_a_precision_that_is_not_written_is_asked_for(portable, tmp_path, capsys):
    copy = Path(shutil.copytree(portable, tmp_path / "p"))
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps({**state, "layout": {**state["layout"], "precision": "fp16"}}))
    write_manifest(copy, {key: value for key, value in read_manifest(copy).items() if key != "files"})
    assert convert(copy, tmp_path / "x", "--to", "deepspeed") == 2
    assert "fp16 cannot be written (its loss scale is not moved); give --precision bf16 or fp32" in sentence(capsys)
    assert convert(copy, tmp_path / "x", "--to", "deepspeed", "--precision", "fp32") == 0


def test_a_damaged_source_writes_nothing(run, tmp_path, capsys):
    source = open_checkpoint(run[1]).path
    tag = Path(shutil.copytree(source, tmp_path / source.name))
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    manifest = read_manifest(tag)
    write_manifest(tag, {key: value for key, value in manifest.items() if key not in ("format", "files")})
    for target in ("portable", "deepspeed", "discrete-only"):
        assert convert(tag, tmp_path / "x", "--to", target) == 2
        assert "is missing" in sentence(capsys)
    assert [p.name for p in tmp_path.iterdir()] == [tag.name]


def test_verify_finds_a_changed_byte(portable, tmp_path, capsys):
    copy = Path(shutil.copytree(portable, tmp_path / "p"))
    path = copy / "optimizer-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert convert(copy, tmp_path / "x", "--to", "portable", "--verify") == 2
    assert "does not match its checksum" in sentence(capsys)


# ------------------------------------------------------------------ hostile portable folders


def _with_header(path: Path, change: Any) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _bigger(header):
    header["head.weight"]["shape"][0] *= 1000


def _beyond(header):
    first, last = header["head.weight"]["data_offsets"]
    header["head.weight"]["data_offsets"] = [first + 10**12, last + 10**12]


def _overlapping(header):
    header["norm.weight"]["data_offsets"] = header["blocks.0.mlp_norm.weight"]["data_offsets"]


def _negative(header):
    header["norm.weight"]["shape"] = [-4, -4]


@pytest.mark.parametrize(
    "change, part",
    [
        (_bigger, "mismatch of type, shape or size of head.weight"),
        (_beyond, "overlap or leaves gaps"),
        (_overlapping, "overlap or leaves gaps"),
        (_negative, "mismatch of type, shape or size of norm.weight"),
        (lambda header: b"[1, 2]", "not a JSON object"),
        (lambda header: b"{" * 1000, "not valid JSON"),
    ],
)
def test_a_header_that_lies_is_refused(change, part, portable, tmp_path):
    path = tmp_path / "model-00001-of-00001.safetensors"
    shutil.copy(portable / path.name, path)
    _with_header(path, change)
    with pytest.raises(CheckpointError, match=part):
        read_header(path)


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header claims"):
        read_header(path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b"])
def test_an_index_that_climbs_out_of_its_folder_is_refused(name, portable, tmp_path):
    copy = Path(shutil.copytree(portable, tmp_path / "p"))
    index = copy / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["head.weight"] = name
    index.write_text(json.dumps(values))
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (copy / "manifest.json").unlink()
    write_manifest(copy, {"step": 3, "layout": {}, "config": {}})
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        open_checkpoint(copy)
    manifest = read_manifest(portable)
    manifest["files"] = {name: {"bytes": 6, "sha256": ""}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        open_checkpoint(copy)


# ------------------------------------------------------------------ memory


PEAK = (
    "import resource, sys; sys.path.insert(0, {root!r}); from vqmoe_ds.checkpoint.convert import build_parser, main; \
code = main(build_parser('').parse_args({args!r})); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024); \
sys.exit(code)"
)


def _peak_megabytes(*args: str) -> int:
    code = PEAK.format(root=str(ROOT), args=list(args))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    return int(answer.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("target", [["portable"], ["deepspeed", "--zero", "2", "--ep", "1", "--world", "1"]])
def test_memory_does_not_grow_with_the_checkpoint(target, tmp_path):
    peaks = []
    for layers in (1, 8):
        tag = tmp_path / f"source-{layers}" / "global_step0000001"
        tag.mkdir(parents=True)
        write_tag(Grown(layers, 256, 512, 16), tag, TagLayout(2, 2, 4))
        peaks.append(_peak_megabytes(str(tag), str(tmp_path / f"to-{layers}"), "--to", *target))
    size = sum(file.stat().st_size for file in tag.iterdir()) >> 20
    assert size > 500
    assert peaks[1] - peaks[0] < 100, peaks


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "complex64", "uint16"])
def test_types_that_are_not_read_are_named(name, tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(4, dtype=getattr(torch, name))}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds w as (F8_E\dM\d|C64|U16), which is not read here; save .*bfloat16"
    ):
        read_header(tmp_path / "model.safetensors")


def test_a_pointer_of_git_lfs_is_no_damaged_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the weights"):
        read_header(tmp_path / "model.safetensors")


def test_what_stands_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "file").write_text("")
    for make in (lambda path: open_checkpoint(path), lambda path: load_tokenizer("bytes").save(path / "below")):
        with pytest.raises(UserError, match="link is a link to gone, which does not exist"):
            make(tmp_path / "link")
        with pytest.raises(UserError, match="file is (a file|not a folder)"):
            make(tmp_path / "file")

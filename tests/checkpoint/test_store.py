"""A checkpoint exists only when it is whole."""

import json
import os
import socket
import threading

import pytest

from vqmoe_ds.checkpoint.io.store import (
    LARGEST,
    MANIFEST,
    checksums,
    find_newest,
    forget_best_after,
    read_best,
    read_manifest,
    tag_name,
    verify,
    write_best,
    write_manifest,
)
from vqmoe_ds.checkpoint.resume.session import begun_from, check_fits, choose, consumed_samples
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.runtime.errors import CheckpointError

STATE = {"samples": 8, "layout": {"world_size": 1}, "config": {"train": {"batch_size": 4}}}


def make(folder, step, text="weights", state=STATE):
    tag = folder / tag_name(step)
    tag.mkdir(parents=True)
    (tag / "a.pt").write_text(text)
    (tag / "b.pt").write_text("more " + text)
    write_manifest(tag, {"step": step, **state})
    return tag


def flips(path):
    """The file with every single bit flipped, one after the other; whole again at the end.

    Bytes are replaced in place: what was truncated and written anew, ext4 sends to the disk as it is closed.
    """
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at in range(8 * len(whole)):
            file.seek(at // 8)
            file.write(bytes([whole[at // 8] ^ 1 << at % 8]))
            yield at
            file.seek(at // 8)
            file.write(whole[at // 8 : at // 8 + 1])


def test_the_newest_whole_tag_is_found_and_the_others_are_named_with_the_reason(tmp_path):
    good = make(tmp_path, 10)
    (make(tmp_path, 20) / "a.pt").unlink()
    (make(tmp_path, 30) / "a.pt").write_text("short")
    (make(tmp_path, 40) / "b.pt").write_text("more WEIGHTS")
    (make(tmp_path, 50) / MANIFEST).unlink()
    (make(tmp_path, 60) / MANIFEST).write_text('{"format": 1, "fi')
    newer = make(tmp_path, 70) / MANIFEST
    newer.write_text(json.dumps({**json.loads(newer.read_text()), "format": 3}))
    found = find_newest(tmp_path)
    assert found.path == good
    reasons = "\n".join(found.passed_over)
    for part in ("format 3", "cannot be read", "never finished", "checksum", "bytes instead of", "is missing"):
        assert part in reasons
    assert len(found.passed_over) == 6


def test_verify_accepts_what_was_written(tmp_path):
    assert verify(make(tmp_path, 10))["step"] == 10


def test_an_empty_folder_has_nothing(tmp_path):
    assert find_newest(tmp_path).path is None
    assert find_newest(tmp_path / "none").path is None


def test_a_manifest_is_replaced_whole(tmp_path):
    tag = make(tmp_path, 1)
    (tag / "c.pt").write_text("c")
    write_manifest(tag, {"step": 1, **STATE})
    assert set(verify(tag)["files"]) == {"a.pt", "b.pt", "c.pt"}
    assert not list(tag.glob(".*.tmp"))
    with pytest.raises(CheckpointError, match=r"c\.pt is missing"):
        (tag / "c.pt").unlink()
        verify(tag)


# ---------------------------------------------------------------- damage


def test_no_flipped_bit_of_a_manifest_verifies(tmp_path):
    tag = make(tmp_path, 7)
    for at in flips(tag / MANIFEST):
        with pytest.raises(CheckpointError) as caught:
            verify(tag)
        assert find_newest(tmp_path).path is None, at
        assert "\n" not in str(caught.value)
    assert verify(tag)["step"] == 7


def test_a_manifest_of_format_1_is_read_and_no_flipped_bit_of_it_crashes_a_resume(tmp_path):
    values = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    (tmp_path / "deepspeed.json").write_text(json.dumps({**values, "zero_optimization": {"stage": 0}}))
    config = resolve(str(tmp_path / "deepspeed.json"), load_config("tiny", None, {"train.batch_size": 2}), 1, 1)
    saved = config.run.model_dump(mode="json")
    tag = tmp_path / tag_name(7)
    tag.mkdir()
    (tag / "a.pt").write_text("weights")
    kept = {name: saved[name] for name in ("train", "data", "moe")}
    old = {"format": 1, "step": 7, "layout": config.layout(), "config": kept, "files": checksums(tag)}
    (tag / MANIFEST).write_text(json.dumps(old))
    assert read_manifest(tag) == {key: value for key, value in old.items() if key != "format"}
    assert consumed_samples(choose(tmp_path, "auto", 0)[0]) == 14
    refused = 0
    for _ in flips(tag / MANIFEST):
        try:
            found, _ = choose(tmp_path, "auto", 0)
            check_fits(config, found)
            consumed_samples(found)
        except CheckpointError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize(
    "text, part",
    [
        ("null", "is not a manifest"),
        ("[" * 100_000, "cannot be read"),
        ("\xff\xfe", "cannot be read"),
        ('{"step": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"format": "1"}', "is of format 1"),
        ('{"format": 2}', "has lost the checksum"),
        ('{"step": -1}', "step is not what"),
        ('{"step": 1, "layout": {}, "config": {}, "files": []}', "files is not what"),
        ('{"step": 1, "layout": {}, "config": {}, "files": {"../a": {"bytes": 1, "sha256": ""}}}', r"files\.\.\./a is"),
        (
            '{"step": 1, "layout": {}, "config": {}, "files": {"a\\u0000": {"bytes": 1, "sha256": ""}}}',
            "name of a file",
        ),
    ],
)
def test_any_manifest_that_is_none_is_one_sentence(tmp_path, text, part):
    tag = make(tmp_path, 1)
    (tag / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=part) as caught:
        verify(tag)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_links_fifos_sockets_and_huge_files_are_passed_over_unread(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    good = make(folder, 1)
    elsewhere = make(tmp_path, 90)
    os.mkfifo(folder / tag_name(90))
    (folder / tag_name(80)).symlink_to(elsewhere)
    (folder / tag_name(70)).write_text("a file")
    for step, damage in ((60, os.mkfifo), (50, lambda path: path.symlink_to(elsewhere / "a.pt")), (40, os.mkdir)):
        tag = make(folder, step)
        (tag / "a.pt").unlink()
        damage(tag / "a.pt")
    for step in (30, 20, 10):
        make(folder, step)
        (folder / tag_name(step) / MANIFEST).unlink()
    os.mkfifo(folder / tag_name(30) / MANIFEST)
    with open(folder / tag_name(20) / MANIFEST, "wb") as file:
        file.truncate(LARGEST + 1)
    with socket.socket(socket.AF_UNIX) as listening, monkeypatch.context() as inside:
        inside.chdir(folder / tag_name(10))  # a socket's path has to be short
        listening.bind(MANIFEST)
    answer = []
    reading = threading.Thread(target=lambda: answer.append(find_newest(folder)), daemon=True)
    reading.start()
    reading.join(10)
    assert answer, "something waits for a FIFO"
    assert answer[0].path == good
    kinds = ("a FIFO, not a folder", "a link, not", "a file, not", "a FIFO, not a reg", "a link, not a reg")
    kinds += ("a folder, not a reg", "a FIFO, not a reg", "more than 64 MiB", "a socket")
    for sentence, kind in zip(answer[0].passed_over, kinds, strict=True):
        assert kind in sentence


def test_steps_are_compared_as_numbers_and_other_names_are_no_tags(tmp_path):
    for name in ("global_step9999999", "global_step10000000", "global_step", "global_step0000001.bak"):
        (tmp_path / name).mkdir()
    assert [name.split("/")[-1].split()[0] for name in find_newest(tmp_path).passed_over] == [
        "global_step10000000",
        "global_step9999999",
    ]


def test_a_tag_that_was_touched_is_read_again(tmp_path):
    tag = make(tmp_path, 3)
    assert find_newest(tmp_path).path == tag
    (tag / "a.pt").write_text("WEIGHTS")
    assert "does not match" in find_newest(tmp_path).passed_over[0]


# ---------------------------------------------------------------- the mark of the best


def test_no_flipped_bit_of_the_mark_names_another_best(tmp_path):
    write_best(tmp_path, tag_name(4), 1.5)
    for _ in flips(tmp_path / "best"):
        assert read_best(tmp_path) == (None, float("inf"))
        forget_best_after(tmp_path, 1)
    assert read_best(tmp_path) == (tag_name(4), 1.5)


@pytest.mark.parametrize("text", ["[]", "{}", '{"tag": 3}', '{"tag": "x", "validation_loss": 1}', "\xff"])
def test_a_mark_that_is_none_names_nothing(tmp_path, text):
    (tmp_path / "best").write_bytes(text.encode("latin-1"))
    assert read_best(tmp_path) == (None, float("inf"))


def test_the_mark_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / "best").write_text(json.dumps({"tag": tag_name(4), "validation_loss": 1.5}) + "\n")
    assert read_best(tmp_path) == (tag_name(4), 1.5)


# ---------------------------------------------------------------- what resume does with it


def test_a_folder_of_damaged_tags_is_refused_in_one_sentence(tmp_path):
    for step in (4, 8):
        (make(tmp_path / "checkpoints", step) / "a.pt").write_text("WEIGHTS")
    for folder, resume in ((tmp_path / "checkpoints", "auto"), (tmp_path / "other", str(tmp_path))):
        with pytest.raises(CheckpointError) as caught:
            choose(folder, resume, 0)
        sentence = str(caught.value)
        for part in ("global_step0000008, global_step0000004", "a.pt does not match", "--resume never", "--run_dir"):
            assert part in sentence
        assert "\n" not in sentence
    assert choose(tmp_path / "checkpoints", "never", 0) == (None, [])
    assert choose(tmp_path / "other", "auto", 0) == (None, []), "a new run's"


def test_a_run_does_not_go_on_from_an_older_checkpoint_beside_newer_ones(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    older, newer = make(folder, 10), make(folder, 20)
    (make(folder, 30) / "a.pt").write_text("WEIGHTS")
    for resume in (older, make(tmp_path / "other", 10)):
        with pytest.raises(CheckpointError, match=f"of step 10, and .* up to {newer}, .*--resume auto, or .*--run_dir"):
            choose(folder, str(resume), 0)
    assert choose(tmp_path / "elsewhere", str(older), 0) == (older, [])
    for resume in ("auto", str(newer), str(tmp_path / "run")):
        assert choose(folder, resume, 0)[0] == newer
    assert len(list(folder.iterdir())) == 3


def test_a_command_that_named_a_checkpoint_goes_on_with_the_run_that_it_began(tmp_path):
    folder, start = tmp_path / "run" / "checkpoints", make(tmp_path / "other", 10)
    assert choose(folder, str(start), 0) == (start, [])
    own = make(folder, 20, state={**STATE, "begun_from": begun_from(str(start), start)})
    assert choose(folder, str(start), 0) == (own, [])
    assert begun_from("auto", own) == begun_from(str(start), own) == str(start) and begun_from("auto", start) is None
    with pytest.raises(CheckpointError, match="--resume auto"):
        choose(folder, str(make(tmp_path / "another", 10)), 0)


def test_a_folder_of_a_thousand_damaged_tags_is_still_one_short_sentence(tmp_path):
    for step in range(1000):
        (tmp_path / tag_name(step)).mkdir()
    with pytest.raises(CheckpointError, match="and 995 more") as caught:
        choose(tmp_path, "auto", 0)
    assert len(str(caught.value)) < 1000

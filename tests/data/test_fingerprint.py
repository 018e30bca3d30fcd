"""Any change of what is trained on changes a fingerprint, and a new place of the same does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.prepared import write_texts
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data import fingerprint
from vqmoe_ds.data.fingerprint import HELD_OUT, of_checkpoint, of_data, of_optimizer, of_pieces
from vqmoe_ds.data.indexed import open_indexed_text
from vqmoe_ds.data.labelled import open_labelled
from vqmoe_ds.data.labelled_batches import encode_texts
from vqmoe_ds.data.raw_text import open_raw_text
from vqmoe_ds.data.tokenizers import ByteTokenizer
from vqmoe_ds.runtime.errors import CheckpointError


def _raw(path: Path, **more: object) -> dict[str, str]:
    values = {"data.path": str(path), "model.sequence_length": 16, **{k.replace("__", "."): v for k, v in more.items()}}
    return of_data(open_raw_text(load_config("tiny", None, values).config))


def test_raw_text_is_known_by_its_bytes_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.txt").write_text("some words " * 100)
    (tmp_path / "a/2.txt").write_text("other words " * 100)
    before = _raw(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert _raw(tmp_path / "b") == before
    (tmp_path / "b/2.txt").write_text("other Words " * 100)
    assert _raw(tmp_path / "b") != before
    (tmp_path / "b/2.txt").rename(tmp_path / "b/0.txt")
    assert _raw(tmp_path / "b") != before, "in another order"
    held_out = _raw(tmp_path / "a", data__valid_path=str(tmp_path / "b"))
    assert _raw(tmp_path / "a", data__holdout_every=5) != before, "another share is held out"
    assert held_out["training text"] == before["training text"] and held_out["held-out text"] != before["held-out text"]


def test_prepared_data_are_known_by_content_order_weights_and_shares(tmp_path: Path) -> None:
    for name in "ab":
        write_texts(tmp_path / name, [f"{name} {number} and some more words" for number in range(40)])

    def of(*path: str, split: str = "90,10,0") -> dict[str, str]:
        values = {"data.path": list(path), "data.split": split, "model.sequence_length": 8}
        data = open_indexed_text(load_config("tiny", None, values).config)
        assert data is not None
        return of_data(data)

    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    before = of(f"0.5:{a}", f"0.5:{b}")
    assert of(f"0.5:{a}", f"0.5:{b}") == before
    for other in (of(f"0.5:{b}", f"0.5:{a}"), of(f"0.4:{a}", f"0.6:{b}"), of(a, b), of(a)):
        assert other != before
    assert of(f"0.5:{a}", f"0.5:{b}", split="80,20,0") != before
    for end in (".bin", ".idx", ".json"):
        shutil.copy(a + end, str(tmp_path / "moved") + end)
    shutil.copytree(a + ".tokenizer", tmp_path / "moved.tokenizer", dirs_exist_ok=True)
    assert of(f"0.5:{tmp_path / 'moved'}", f"0.5:{b}") == before
    write_texts(tmp_path / "moved", [f"a {number} and some more wordS" for number in range(40)])
    assert of(f"0.5:{tmp_path / 'moved'}", f"0.5:{b}") != before


@pytest.mark.parametrize("place", [0, 10_000, 999_999])
def test_of_much_text_blocks_of_every_part_and_all_sizes_count(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK", 100)
    text = np.arange(1_000_000, dtype=np.uint64).astype(np.uint8)
    before, pieces = of_pieces([text[:300_000], text[300_000:]]), text.copy()
    pieces[max(0, place - 5000) : place + 5000] += 1
    assert of_pieces([pieces[:300_000], pieces[300_000:]]) != before
    assert of_pieces([text[:300_001], text[300_001:]]) != before
    assert of_pieces([text[:300_000].copy(), text[300_000:].copy()]) == before


def test_labels_texts_and_classes_count(tmp_path: Path) -> None:
    def of(rows: str) -> str:
        (tmp_path / "set.csv").write_text(f"text,label\n{rows}")
        labelled = open_labelled(str(tmp_path / "set.csv"), "train")
        return fingerprint.of_labelled(encode_texts(labelled, ByteTokenizer(), 16))

    before = of("good,1\nbad,0\n")
    assert of("good,1\nbad,0\n") == before
    assert (
        len({before, of("good,1\nbad,1\nx,0\n"), of("goo,1\nbad,0\n"), of("good,0\nbad,1\n"), of("good,a\nbad,b\n")})
        == 5
    )


def test_a_checkpoint_is_known_by_its_manifest_or_its_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1")
    before = of_checkpoint(tmp_path)
    (tmp_path / "weights").write_bytes(b"2")
    assert of_checkpoint(tmp_path) != before
    (tmp_path / "manifest.json").write_text("{}")
    before = of_checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text("{ }")
    assert of_checkpoint(tmp_path) != before


def test_layout_and_numbers_of_a_deepspeed_json_may_change_and_its_optimizer_and_scheduler_may_not() -> None:
    values: dict = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 2}}
    before = of_optimizer(values)
    assert of_optimizer({"optimizer": {"type": "adamw", "params": {"lr": 2e-3}}}) == before
    assert of_optimizer({"optimizer": {"type": "Lion"}}) != before
    assert of_optimizer({**values, "scheduler": {"type": "WarmupLR"}}) != before


def test_a_checkpoint_of_before_tells_the_share_held_out_by_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from vqmoe_ds.checkpoint.resume import session

    there = {"training text": "t", "held-out text": "h"}
    manifest: dict = {"data": there, "config": {"data": {"holdout_every": 10, "valid_path": None}}}
    monkeypatch.setattr(session, "read_manifest", lambda tag: manifest)
    assert session.check_data({**there, HELD_OUT: "10"}, Path("tag"), False) is None
    with pytest.raises(CheckpointError, match=r"changed: share of the text held out \(data\.holdout_every\)\)"):
        session.check_data({**there, HELD_OUT: "5"}, Path("tag"), False)
    manifest["config"]["data"]["valid_path"] = "other.txt"
    assert session.check_data({**there, HELD_OUT: "0"}, Path("tag"), False) is None

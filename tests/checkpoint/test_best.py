"""Which checkpoint of a run folder is taken: the newest, of a fine-tuning the one that validated best."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.huggingface import ModelReader, config_of, model_of
from vqmoe_ds.checkpoint import convert
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.inspect import inspect
from vqmoe_ds.checkpoint.io.store import tag_name, write_best
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.resume.session import choose
from vqmoe_ds.config.schema import FinetuneConfig
from vqmoe_ds.finetune.predict import load_classifier
from vqmoe_ds.models.classifier import Classifier
from vqmoe_ds.runtime.errors import CheckpointError

TUNED = FinetuneConfig(checkpoint="runs/pretrain", task="lm")
CLASSIFIER = FinetuneConfig(checkpoint="runs/pretrain", task="sst2", classes=("no", "yes"))


def write_run(folder: Path, tuned: FinetuneConfig, best: int | None = 2) -> Path:
    """A run folder with checkpoints of steps 2 and 4 of different weights, the first of them marked as the best."""
    config = config_of("top-2", vocab=256).model_copy(update={"finetune": tuned})
    model = Classifier(config).eval() if tuned.classes else model_of(config)
    for step in (2, 4):
        tag = folder / "checkpoints" / tag_name(step)
        tag.mkdir(parents=True)
        with torch.no_grad():
            model.norm.weight.fill_(step)
        write_portable(ModelReader(model, tag, step), tag)
    if best is not None:
        write_best(folder / "checkpoints", tag_name(best), 1.5)
    return folder


def test_every_reader_takes_the_best_of_a_fine_tuning(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TUNED)
    assert open_checkpoint(run).step == open_checkpoint(run / "checkpoints").step == 2
    loaded = load_model(run)
    assert (loaded.step, loaded.path.name) == (2, tag_name(2)) and bool((loaded.model.norm.weight == 2).all())
    assert inspect(str(run), verify=True)["step"] == 2
    for to in ("portable", "hf"):
        options = convert.build_parser("").parse_args([str(run), str(tmp_path / to), "--to", to])
        assert convert.main(options) == 0
        assert open_checkpoint(tmp_path / to).step == 2
    assert load_model(run / "checkpoints" / tag_name(4)).step == 4


def test_a_classifier_is_that_of_its_best_validation(tmp_path: Path) -> None:
    model, _ = load_classifier(write_run(tmp_path, CLASSIFIER))
    assert bool((model.norm.weight == 2).all())


@pytest.mark.parametrize(("tuned", "best"), [(TUNED, None), (FinetuneConfig(), 2)], ids=["unvalidated", "pretraining"])
def test_the_newest_is_taken_of_all_others(tuned: FinetuneConfig, best: int | None, tmp_path: Path) -> None:
    assert open_checkpoint(write_run(tmp_path, tuned, best)).step == 4


def test_a_fine_tuning_resumes_from_its_newest(tmp_path: Path) -> None:
    run = write_run(tmp_path, TUNED)
    newest = run / "checkpoints" / tag_name(4)
    assert choose(run / "checkpoints", "auto", 0)[0] == choose(run / "none", str(run), 0)[0] == newest


def test_nothing_else_passes_for_a_best_that_is_damaged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TUNED)
    with open(run / "checkpoints" / tag_name(2) / "buffers.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"buffers.safetensors has \d+ bytes.*validated best.*name another"):
        open_checkpoint(run)
    for kind, tuned in {"tuned": TUNED, "pretrained": FinetuneConfig()}.items():
        write_run(tmp_path / kind, tuned)
        (tmp_path / kind / "checkpoints" / "best").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="best cannot be read.*name another checkpoint"):
        open_checkpoint(tmp_path / "tuned")
    assert open_checkpoint(tmp_path / "pretrained").step == 4


def test_a_damaged_newest_does_not_hide_that_a_run_is_a_fine_tuning(tmp_path: Path) -> None:
    run = write_run(tmp_path, TUNED)
    (run / "checkpoints" / tag_name(4) / "manifest.json").write_text("{", encoding="utf-8")
    assert open_checkpoint(run).step == 2

"""What is settled before training: the vocabulary, and one run folder for all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.distributed import run_ranks
from tests.images import write_folder
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.runtime.errors import ConfigError, DataError
from vqmoe_ds.runtime.ranks import from_first
from vqmoe_ds.train.pretrain import _greeting, choose_run_dir, fit_to_data, fit_to_tokenizer

CHECKSUM = "0123456789abcdef" * 4
IMAGES = {"preset": "vit-cifar", "model__vocab_size": 2}


def _fit(
    folder: Path, vocab_size: int | None, checksum: str | None, preset: str = "tiny", **overrides: object
) -> EngineConfig:
    path = folder / "ds.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}))
    loaded = load_config(preset, None, {name.replace("__", "."): value for name, value in overrides.items()})
    return fit_to_tokenizer(resolve(str(path), loaded, 1), vocab_size, checksum, loaded.explicit)


def test_the_vocabulary_follows_the_data_and_may_be_set_larger(tmp_path):
    run = _fit(tmp_path, 8192, CHECKSUM).run
    assert (run.model.vocab_size, run.data.tokenizer_sha256) == (8192, CHECKSUM)
    assert _fit(tmp_path, 8192, CHECKSUM, model__vocab_size=8256).run.model.vocab_size == 8256
    assert _fit(tmp_path, None, "unknown", model__vocab_size=500).run.model.vocab_size == 500
    raw = _fit(tmp_path, 256, None).run
    assert (raw.model.vocab_size, raw.data.tokenizer_sha256) == (256, None)
    again = _fit(tmp_path, 8192, CHECKSUM, data__tokenizer_sha256=CHECKSUM, model__vocab_size=8192).run
    assert again == run, "a config.yaml that a run wrote gives the same run"


@pytest.mark.parametrize(
    ("vocab_size", "overrides", "told"),
    [
        (256, {}, False),
        (8192, {}, True),
        (8192, {"codebook__source": "token_embedding"}, False),
        (8192, {"moe__router": "hash_and_code"}, False),
        (8192, {"moe__router": "topk"}, False),
    ],
)
def test_a_run_on_words_is_told_what_suits_them(tmp_path, vocab_size, overrides, told):
    config = _fit(tmp_path, vocab_size, CHECKSUM, **overrides)
    data = SimpleNamespace(summary=lambda: "words")
    hints = [line for line in _greeting(config, data, tmp_path) if line.startswith("hint: ")]
    assert len(hints) == told and all("8,192 token ids" in hint for hint in hints)


@pytest.mark.parametrize(
    ("vocab_size", "checksum", "overrides", "sentence"),
    [
        (8192, CHECKSUM, {"model__vocab_size": 8191}, "model.vocab_size=8191 is too small for the 8192 ids"),
        (3, None, IMAGES, "model.vocab_size=2 is too small for the 3 classes of the images; leave it out"),
        (1, None, IMAGES, "model.vocab_size=2 is too large for the 1 classes of the images; leave it out"),
        (None, "unknown", {"data__path": "corpora/x"}, "tokenizer of corpora/x is unknown"),
        (8192, CHECKSUM, {"data__tokenizer_sha256": "ff"}, f"sha256=ff is not that of the data, which is {CHECKSUM}"),
        (256, None, {"data__tokenizer_sha256": CHECKSUM}, "is not that of the data, which is raw bytes"),
    ],
)
def test_what_the_data_does_not_have_is_refused(tmp_path, vocab_size, checksum, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        _fit(tmp_path, vocab_size, checksum, **overrides)


@pytest.mark.parametrize("field", ["path", "valid_path"])
def test_images_are_not_trained_on_as_text(field, tmp_path):
    folder = write_folder(tmp_path / "images", 1)
    (tmp_path / "words.txt").write_text("some words " * 99)
    config = _fit(tmp_path, 256, None, **{"data__path": str(tmp_path / "words.txt"), f"data__{field}": str(folder)})
    with pytest.raises(DataError, match="images holds images, and this run trains on text; choose --preset vit-cifar"):
        fit_to_data(config, frozenset())


def test_a_job_that_depends_on_another_does_nothing_only_where_the_steps_asked_for_are_done(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_DEPENDENCY", "afterok:7(unfulfilled)")
    (tmp_path / "summary.json").write_text('{"steps": 1000}')

    def choose(steps: int) -> Path | None:
        config = _fit(tmp_path, 256, None, run__run_dir=str(tmp_path), train__steps=steps)
        return choose_run_dir(config, True, "auto")

    assert choose(1000) is None
    assert choose(2000) == tmp_path
    with pytest.raises(ConfigError, match="holds a finished run of 1000 steps; raise --train_steps"):
        choose(500)
    monkeypatch.delenv("SLURM_JOB_DEPENDENCY")
    with pytest.raises(ConfigError, match="holds a finished run of 1000 steps; raise --train_steps"):
        choose(1000)


def _agree(rank: int, world: int) -> Path:
    return from_first(Path(f"runs/pretrain-{rank}"))


def test_all_ranks_use_the_run_folder_of_rank_0():
    assert run_ranks(2, _agree) == [Path("runs/pretrain-0")] * 2

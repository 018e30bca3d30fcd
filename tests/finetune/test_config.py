"""What a fine-tuning is made of: the checkpoint's model, its own defaults, the user's wishes; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.layouts import Layout, write_one
from tests.distributed import run_ranks
from tests.finetune.small import finetune_config
from vqmoe_ds.checkpoint.reader import open_checkpoint
from vqmoe_ds.config.schema import CodeSource
from vqmoe_ds.errors import ConfigError
from vqmoe_ds.finetune.config import classifier_config

ONE = Layout(0, 1, 1)
SOURCES: dict[str, dict[str, Any]] = {
    "vq": {"codebook.source_momentum": 0.0},
    "vq_averaged": {"codebook.source_momentum": 0.9},
    "vq_states": {"codebook.source_momentum": 0.0, "codebook.source": "layer_state"},
    "smoe_dropout": {"moe.router": "smoe_dropout", "moe.top_k": 1},
}


def _pretrain(rank: int, world: int, folder: str) -> None:
    for name, changes in SOURCES.items():
        (Path(folder) / name).mkdir()
        write_one(rank, world, str(Path(folder) / name), ONE, changes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    run_ranks(1, _pretrain, str(folder))
    return folder


def test_a_vq_model_keeps_its_discrete_path_and_its_quantizer(sources):
    reader = open_checkpoint(sources / "vq")
    plain, everything, both, moving = (
        finetune_config(reader, **changes).config
        for changes in (
            {},
            {"finetune.trainable": "all"},
            {"finetune.discrete": False},
            {"codebook.learning": "ema", "finetune.trainable": "all"},
        )
    )
    assert (plain.moe.top_k, plain.codebook.learning, plain.codebook.source_momentum) == (0, "frozen", 0)
    assert everything.codebook.source_momentum == 1
    assert (both.moe.top_k, both.codebook.learning) == (1, "ema")
    assert (moving.moe.top_k, moving.codebook.learning, moving.codebook.source_momentum) == (0, "ema", 0)
    averaged = finetune_config(open_checkpoint(sources / "vq_averaged")).config
    assert averaged.codebook.source_momentum == 1
    states = finetune_config(open_checkpoint(sources / "vq_states"), **{"finetune.trainable": "all"}).config
    assert (states.codebook.source, states.codebook.source_momentum) == (CodeSource.LAYER_STATE, 0)


def test_schedules_by_the_steps_of_a_run_keep_those_of_the_pretraining(sources):
    router = finetune_config(open_checkpoint(sources / "smoe_dropout")).config.router
    assert (router.growth_steps, router.distil_steps) == (60, 6)


def test_steps_follow_from_the_texts_and_few_shots_have_small_batches(sources):
    loaded = finetune_config(open_checkpoint(sources / "vq"))
    left_open = type(loaded)(loaded.config, frozenset())
    many = classifier_config(left_open, ("a", "b"), 8000).config
    assert (many.train.steps, many.run.eval_every, many.run.save_every) == (5000, 200, 200)
    few = left_open.config.finetune.model_copy(update={"shots": 3})
    left_open = type(loaded)(left_open.config.model_copy(update={"finetune": few}), frozenset())
    shots = classifier_config(left_open, ("a", "b"), 6).config
    assert (shots.train.batch_size, shots.train.steps, shots.run.eval_every) == (4, 100, 10)
    with pytest.raises(ConfigError, match="train.batch_size=8 is more than the 6 training texts"):
        classifier_config(loaded, ("a", "b"), 6)


def test_what_cannot_be_is_refused(sources, monkeypatch):
    reader = open_checkpoint(sources / "vq")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the Python package peft; pip install 'vqmoe_ds\[lora\]'"):
        finetune_config(reader, **{"finetune.lora_rank": 2})

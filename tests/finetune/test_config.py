"""What a fine-tuning is made of: the checkpoint's model, its own defaults, the user's wishes; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.layouts import Layout, write_one
from tests.distributed import run_ranks
from tests.finetune.small import finetune_config
from tests.prepared import write_texts
from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
from vqmoe_ds.checkpoint.formats.megatron.writer import MegatronOptions, export_megatron
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.checkpoint.views.discrete import DiscreteOnly
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.routers import router_class
from vqmoe_ds.config.schema import CodeSource
from vqmoe_ds.finetune.cli import build_parser
from vqmoe_ds.finetune.config import check_batch, check_can_run, classifier_config, starting_config
from vqmoe_ds.finetune.language import open_text
from vqmoe_ds.finetune.run_folder import check_finished, check_kind, check_same
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError

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
    assert finetune_config(open_checkpoint(sources / "smoe_dropout")).config.router.model_dump()["growth_steps"] == 60
    stablemoe = router_class("stablemoe")
    assert stablemoe.with_schedules(stablemoe.Options(), 60).distil_steps == 6


def test_steps_follow_from_the_texts_and_few_shots_have_small_batches(sources):
    loaded = finetune_config(open_checkpoint(sources / "vq"))
    left_open = type(loaded)(loaded.config, frozenset())
    many = classifier_config(left_open, ("a", "b"), 8000).config
    assert (many.train.steps, many.run.eval_every, many.run.save_every) == (5000, 200, 200)
    few = left_open.config.finetune.model_copy(update={"shots": 3})
    left_open = type(loaded)(left_open.config.model_copy(update={"finetune": few}), frozenset())
    shots = classifier_config(left_open, ("a", "b"), 6).config
    assert (shots.train.batch_size, shots.train.steps, shots.run.eval_every) == (4, 1000, 10)
    asked = type(loaded)(left_open.config, frozenset({"finetune.epochs"}))
    assert classifier_config(asked, ("a", "b"), 6).config.train.steps == 8, "five epochs are five epochs"
    with pytest.raises(ConfigError, match="train.batch_size=8 is more than the 6 training texts"):
        classifier_config(loaded, ("a", "b"), 6)


def test_what_cannot_be_is_refused(sources, monkeypatch):
    reader = open_checkpoint(sources / "vq")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora_rank needs peft, .*: pip install 'vqmoe_ds\[lora\]'"):
        finetune_config(reader, **{"finetune.lora_rank": 2})


def test_the_discrete_path_of_a_megatron_folder_has_its_values(sources, tmp_path):
    reader = open_checkpoint(sources / "vq")
    export_megatron(reader, tmp_path / "megatron", MegatronOptions(ep=2))
    ours, theirs = DiscreteOnly(reader), DiscreteOnly(open_checkpoint(tmp_path / "megatron"))
    assert set(ours.names()) == set(theirs.names())
    for name in ours.names():
        assert torch.equal(theirs.tensor(name), ours.tensor(name)), name


def _resolve(folder: Path, reader: CheckpointReader, deepspeed: dict[str, Any], **changes: Any) -> EngineConfig:
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    return resolve(str(folder / "deepspeed.json"), finetune_config(reader, **changes), 1)


def test_experts_that_zero3_cannot_save_are_not_frozen(sources, tmp_path):
    reader, stage3 = open_checkpoint(sources / "vq"), {"zero_optimization": {"stage": 3}}
    head = {"finetune.trainable": "head"}
    with pytest.raises(ConfigError, match="cannot save frozen experts at ZeRO-3; take a DeepSpeed config of ZeRO 0 to"):
        check_can_run(_resolve(tmp_path, reader, stage3, **head))
    check_can_run(_resolve(tmp_path, reader, stage3))
    check_can_run(_resolve(tmp_path, reader, stage3, **head, **{"moe.router": "dense"}))
    check_can_run(_resolve(tmp_path, reader, {}, **head))


@pytest.mark.parametrize("spec", ["raw.txt", "bytes"])
def test_text_of_another_tokenizer_is_refused(sources, tmp_path, spec):
    (tmp_path / "raw.txt").write_text("many words " * 200)
    write_texts(tmp_path / "bytes", ["many words " * 20] * 20)
    reader = open_checkpoint(sources / "vq")
    loaded = finetune_config(reader, task="lm", **{"data.path": str(tmp_path / spec)})
    with pytest.raises(
        CheckpointError, match=r"vocabulary 61\), the text of --data is .* \(vocabulary 25[67]\); prepare"
    ):
        open_text(loaded, run_config(reader.config, reader.path), reader)


def test_a_text_model_stays_one(sources):
    reader = open_checkpoint(sources / "vq")
    with pytest.raises(ConfigError, match=r"model.image_size=16 is not that of .*, 0: fine-tuning keeps the model"):
        changes = {"model.image_size": 16, "model.sequence_length": 16, "codebook.source": "token_embedding"}
        finetune_config(reader, **changes)


@pytest.mark.parametrize("text", ["", "[]", "finetune: 3"])
def test_a_finished_folder_whose_configuration_was_damaged_is_refused(sources, tmp_path, text):
    config = _resolve(tmp_path, open_checkpoint(sources / "vq"), {})
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml is no configuration of a run; choose another --run_dir"):
        check_finished(tmp_path, config)


@pytest.mark.parametrize(
    ("section", "name", "theirs"),
    [("train", "seed", 2), ("finetune", "text_key", "review"), ("data", "path", "other.txt")],
)
def test_a_run_folder_keeps_its_texts_and_its_splits(sources, tmp_path, section, name, theirs):
    config = _resolve(tmp_path, open_checkpoint(sources / "vq"), {})
    saved = config.run.model_dump(mode="json")
    check_same(tmp_path, saved, config)
    saved[section][name] = theirs
    with pytest.raises(ConfigError, match=f"holds another fine-tuning: {section}.{name}={theirs} there, .* here"):
        check_same(tmp_path, saved, config)


def test_a_single_run_and_several_do_not_share_a_folder(tmp_path):
    check_kind(tmp_path, several=True)
    (tmp_path / "seed-1").mkdir()
    with pytest.raises(ConfigError, match=r"holds several runs \(--seeds or --shots\)"):
        check_kind(tmp_path, several=False)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a single run"):
        check_kind(tmp_path, several=True)


def test_a_batch_of_the_json_is_not_made_smaller_for_few_shots(sources, tmp_path):
    reader = open_checkpoint(sources / "vq")
    config = _resolve(tmp_path, reader, {"train_batch_size": 8})
    with pytest.raises(ConfigError, match='gives train_batch_size=8; write "auto" there'):
        check_batch(config, 2, "zero2.json")
    check_batch(config, 8, "zero2.json")


def test_columns_by_short_names_and_paths_that_hold_from_anywhere(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = open_checkpoint(sources / "vq")
    line = ["--checkpoint", "vq", "--task", "mine=sets/ag", "--text_column", "1,2", "--label_column", "0:coarse"]
    config = starting_config(build_parser("").parse_args(line), reader).config.finetune
    assert (config.text_key, config.label_key) == ("1,2", "0:coarse")
    assert (config.checkpoint, config.task) == (f"{tmp_path}/vq", f"mine={tmp_path}/sets/ag")
    with pytest.raises(ConfigError, match=r"--label_column 0:coarse contradicts --set finetune.label_key=x; leave"):
        starting_config(build_parser("").parse_args([*line, "--set", "finetune.label_key=x"]), reader)
    data = finetune_config(reader, task="lm", **{"data.path": "text.txt"}).config.data
    assert data.path == f"{tmp_path}/text.txt"


@pytest.mark.parametrize(
    ("field", "value"),
    [("codebook.num_codes", 3), ("moe.num_experts", 2), ("model.width", 8), ("codebook.source", "token_embedding")],
)
def test_sizes_of_the_model_stay_those_of_the_checkpoint(field, value, sources):
    reader = open_checkpoint(sources / "vq")
    theirs = run_config(reader.config, reader.path).model_dump(mode="json")
    section, name = field.split(".")
    finetune_config(reader, **{field: theirs[section][name]})
    with pytest.raises(ConfigError, match=f"{field}={value} is not that of .*: fine-tuning keeps .* leave {field} out"):
        finetune_config(reader, **{field: value})

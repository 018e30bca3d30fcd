"""The command lines of the training launchers: short names, contradictions, and what ``--help`` says."""

from __future__ import annotations

import argparse
import os

import pytest

from vqmoe_ds.config import cli
from vqmoe_ds.config import routers as registry
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.finetune import cli as finetune_cli
from vqmoe_ds.runtime.errors import ConfigError


def _read(*words: str) -> argparse.Namespace:
    return cli.build_parser("").parse_args(list(words))


def _help(parser: argparse.ArgumentParser, *words: str, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        parser.parse_args([*words, "--help"])
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_short_names_are_the_fields_they_name():
    words = "--lr 1e-3 --batch_size 8 --seq_len 64 --train_steps 5 --seed 7 --data a b --run_dir r"
    run = cli.config_from_args(_read(*words.split())).config
    assert (run.train.learning_rate, run.train.batch_size, run.train.steps, run.train.seed) == (1e-3, 8, 5, 7)
    assert (run.model.sequence_length, run.data.path, run.run.run_dir) == (64, ["a", "b"], "r")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--lr 1e-3 --set train.learning_rate=2e-3", "--lr 0.001 contradicts --set train.learning_rate=0.002"),
        ("--seq_len 64 --set model.sequence_length=32", "--seq_len 64 contradicts --set model.sequence_length=32"),
        ("--train_steps 5 --set train.steps=6", "--train_steps 5 contradicts --set train.steps=6"),
        ("--lr -1", "train.learning_rate=-1.0: input should be greater than 0"),
        ("--lr nan", "train.learning_rate is nan"),
    ],
)
def test_contradictions_and_bad_values_are_one_sentence(words, sentence):
    with pytest.raises(ConfigError) as caught:
        cli.config_from_args(_read(*words.split()))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_short_name_may_be_repeated_by_set_but_not_contradict_the_json(tmp_path):
    same = cli.config_from_args(_read("--lr", "1e-3", "--set", "train.learning_rate=0.001"))
    assert same.config.train.learning_rate == 1e-3
    (tmp_path / "ds.json").write_text('{"train_batch_size": 4, "optimizer": {"params": {"lr": 0.01}}}')
    for words, sentence in (
        (["--lr", "1e-3"], "train.learning_rate=0.001 contradicts lr=0.01"),
        (["--batch_size", "8"], "train.batch_size=8 contradicts train_batch_size=4"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            resolve(str(tmp_path / "ds.json"), cli.config_from_args(_read(*words)), 1, gpu=False)


def test_the_shipped_json_is_the_default_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parser in (cli.build_parser(""), finetune_cli.build_parser("")):
        path = parser.parse_args([]).ds_config
        assert os.path.isabs(path) and path.endswith("ds_configs/zero2.json")
        assert resolve(path, cli.config_from_args(_read()), 1, gpu=False).zero_stage == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["[train.batch_size, default 16]", "model.width = 128", "model.sequence_length = 128 [tokens]"]),
        (["--preset", "base"], ["[train.batch_size, default 44]", "model.width = 256"]),
        (["--preset=large"], ["model.width = 512"]),
        (["--preset", "none of them"], ["model.width = 128"]),
    ],
)
def test_help_shows_the_defaults_of_the_preset(words, parts, capsys):
    text = _help(cli.build_parser(""), *words, capsys=capsys)
    assert all(part in text for part in parts), text
    text = text[text.index("daily options:") :]
    assert text.index("--lr") < text.index("further options:") < text.index("--ds_config")


@pytest.mark.parametrize("parser", [cli.build_parser(""), finetune_cli.build_parser("")], ids=["pretrain", "finetune"])
def test_help_with_a_broken_plug_in_is_one_sentence(parser, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setenv(registry.PLUGINS, "nope.py")
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--help"])
    assert left.value.code == 2
    told = capsys.readouterr()
    assert not told.out
    assert told.err.endswith("error: plug-in nope.py does not exist; --plugin takes a Python file\n")


def test_help_lists_choices_and_only_the_fields_of_the_command(capsys):
    text = _help(cli.build_parser(""), capsys=capsys)
    assert "(choices: layer_state, token_embedding, position_embedding, context, early_block, patch)" in text
    assert "(choices: euclidean, cosine)" in text and "train.activation_checkpointing = false" in text
    assert "finetune." not in text
    text = _help(finetune_cli.build_parser(""), capsys=capsys)
    assert "finetune.trainable = experts" in text and "model.width" not in text
    for part in ("train.learning_rate = 0.0005", "run.keep_best = true", "moe.top_k = as in the checkpoint; 0 of a vq"):
        assert part in text
    assert "text of --task lm: file or folder" in text and "standard library's documentation [" not in text

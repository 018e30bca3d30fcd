"""Figures of clean and damaged text against slow references, and the same on any number of ranks."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from tests.huggingface import LENGTH, ModelReader, config_of, model_of
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.load_model import LoadedModel, load_model
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.tokenizers import ByteTokenizer, WordTokenizer
from vqmoe_ds.evaluation import command
from vqmoe_ds.evaluation.command import share_windows
from vqmoe_ds.evaluation.corruption import Corruption, all_corruptions
from vqmoe_ds.evaluation.evaluate import Options, evaluate, table
from vqmoe_ds.evaluation.statistics import mean_of
from vqmoe_ds.evaluation.texts import Text, encode, open_texts
from vqmoe_ds.runtime.errors import ConfigError, DataError
from vqmoe_ds.runtime.files import new_folder
from vqmoe_ds.runtime.ranks import Place

STORY = b"The old captain of the harbour had never seen a ship like that.\nMany ships came, and he knew each of them.\n"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    config = config_of("context", vocab=257)
    return LoadedModel(config, model_of(config), ByteTokenizer(), 7, Path("memory"), "portable")


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [encode(ByteTokenizer(), raw, 256) for raw in (STORY, STORY[:9], STORY[5:40])]


def test_the_clean_figures_are_sums_over_all_tokens_but_the_first_of_each_document(loaded, texts):
    clean = evaluate(loaded, texts, Options(stride=LENGTH)).clean
    assert clean["tokens"] == sum(len(text.ids_N) - 1 for text in texts)
    assert clean["bytes"] == sum(len(text.raw) - 1 for text in texts), "the end of a document is no byte"
    assert clean["words"] == sum(len(text.raw.split()) + text.raw.count(b"\n") for text in texts)
    nats = clean["nats_per_token"] * clean["tokens"]
    assert clean["bits_per_byte"] == pytest.approx(nats / clean["bytes"] / math.log(2))
    assert clean["perplexity"] == pytest.approx(math.exp(clean["nats_per_token"]))
    assert clean["word_perplexity"] == pytest.approx(math.exp(nats / clean["words"]))


@pytest.mark.parametrize("kind", ["word_swap", "char_noise", "word_drop"])
def test_damage_of_rate_zero_is_no_damage(loaded, texts, kind):
    result = evaluate(loaded, texts, Options(corruptions=(Corruption(kind, 0.0),), seeds=2))
    for row in result.corrupted:
        assert (
            row["mean"]["changed"] == row["mean"]["bits_per_byte_rise"] == row["standard_error"]["bits_per_byte"] == 0
        )
        assert {name: row["mean"][name] for name in result.clean} == result.clean


def test_damaged_inputs_are_asked_for_the_clean_tokens_and_compared_with_the_same_in_clean_text(loaded):
    raw = b"a fine ship!"  # within one context, so one forward pass is a reference
    text, swap = encode(ByteTokenizer(), raw), Corruption("word_swap", 1 / 3)
    (edit,) = swap.damage(raw, 0).edits
    damaged = raw[: edit.start] + b"AAA" + raw[edit.end :]
    asked = [*range(1, edit.start + 1), *range(edit.end, len(raw))]  # all but the first byte and the rest of the word
    places = [place if place <= edit.start else place + 3 - (edit.end - edit.start) for place in asked]

    @torch.no_grad()
    def nats(inputs: bytes, where: list[int], wanted: list[int]) -> float:
        logits = loaded.model(torch.tensor([list(inputs)]))[0][0].double().log_softmax(-1)
        return -sum(float(logits[place - 1, byte]) for place, byte in zip(where, wanted, strict=True))

    rows = evaluate(loaded, [text], Options(corruptions=(swap,), seeds=1)).corrupted
    only, both = (row["mean"] for row in rows)
    here, clean = nats(damaged, places, [raw[i] for i in asked]), nats(raw, asked, [raw[i] for i in asked])
    assert only["tokens"] == only["bytes"] == len(asked) and only["words"] is None
    assert only["nats_per_token"] == pytest.approx(here / len(asked), abs=1e-5)
    assert only["nats_per_token_rise"] == pytest.approx((here - clean) / len(asked), abs=1e-5)
    everything = list(range(1, len(damaged)))
    assert both["nats_per_token"] == pytest.approx(
        nats(damaged, everything, list(damaged[1:])) / len(everything), abs=1e-5
    )
    assert both["tokens"] == len(damaged) - 1


def test_of_whole_words_inputs_only_keeps_all_targets_and_their_perplexity():
    words = WordTokenizer(sorted(set(STORY.decode().split())))
    config = config_of("context", vocab=words.vocab_size)
    loaded = LoadedModel(config, model_of(config), words, 7, Path("memory"), "portable")
    result = evaluate(loaded, [encode(words, STORY * 3)], Options(corruptions=(Corruption("word_swap", 0.2),)))
    only = result.corrupted[0]["mean"]
    assert {name: only[name] for name in ("tokens", "bytes", "words")} == {
        name: result.clean[name] for name in ("tokens", "bytes", "words")
    }
    assert only["word_perplexity"] is not None
    assert only["bits_per_byte_rise"] == pytest.approx(only["bits_per_byte"] - result.clean["bits_per_byte"])


def test_seeds_differ_runs_do_not_and_the_spread_is_their_standard_error(loaded, texts):
    options = Options(corruptions=tuple(all_corruptions()), seeds=3)
    result = evaluate(loaded, texts, options)
    assert evaluate(loaded, texts, options) == result
    row = next(row for row in result.corrupted if row["kind"] == "char_noise")
    values = [seed["bits_per_byte"] for seed in row["seeds"]]
    assert len(set(values)) == 3 and [seed["seed"] for seed in row["seeds"]] == [0, 1, 2]
    assert row["mean"]["bits_per_byte"] == pytest.approx(sum(values) / 3)
    assert row["standard_error"]["bits_per_byte"] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    assert mean_of([1.0]).error is None
    lines = table(json.loads(json.dumps(asdict(result))))
    assert len(lines) == 3 + 1 + 8 and "±" in lines[-1] and lines[4].startswith("word_swap 0.025, inputs ")
    assert len({len(line) for line in lines[2:]}) == 1


def test_texts_of_other_domains_have_the_figures_that_they_have_alone_and_their_rise_over_the_data(loaded, texts):
    others = [encode(ByteTokenizer(), b"def ship(harbour):\n    return harbour + 1\n", 256), texts[2]]
    result = evaluate(loaded, texts, shifted={"code": others, "again": texts})
    alone, (row, again) = evaluate(loaded, others).clean, result.shifted
    assert row == {
        "text": "code",
        **alone,
        "bits_per_byte_rise": alone["bits_per_byte"] - result.clean["bits_per_byte"],
        "nats_per_token_rise": alone["nats_per_token"] - result.clean["nats_per_token"],
    }
    assert again["bits_per_byte_rise"] == 0 and again["tokens"] == result.clean["tokens"]
    lines = table(json.loads(json.dumps(asdict(result))))
    assert lines[-2].startswith("code ") and len({len(line) for line in lines[2:]}) == 1


def test_what_cannot_be_scored_is_refused(loaded, texts):
    with pytest.raises(ConfigError, match=f"--stride 17 must lie between 1 and the model's context of {LENGTH} tokens"):
        evaluate(loaded, texts, Options(stride=17))
    with pytest.raises(DataError, match="the tokenizer of the data is unknown, so its text cannot be damaged"):
        evaluate(loaded, [Text(np.arange(20))], Options(corruptions=(Corruption("word_drop", 0.1),)))
    unknown = evaluate(loaded, [Text(np.arange(20))]).clean
    assert unknown["tokens"] == 19 and unknown["bits_per_byte"] is unknown["word_perplexity"] is None
    config = RunConfig(
        **{**loaded.config.model_dump(mode="json"), "moe": {"router": "expert_choice", "num_experts": 4}}
    )
    with pytest.raises(ConfigError, match="scoring text needs a router that sees no later token"):
        evaluate(LoadedModel(config, loaded.model, ByteTokenizer(), 7, Path("m"), "portable"), texts)


def _on_ranks(rank, world, folder, ep_size, sp_size=1, most=None):
    loaded = load_model(Path(folder) / "model", ep_size=ep_size, ep_rank=rank % ep_size)
    share_windows(loaded, sp_size, Place(rank, world, rank, world))
    texts = open_texts(loaded, [f"{folder}/text"])
    options = Options(corruptions=tuple(all_corruptions())[:most], seeds=2, batch_size=3)
    told: list[int] = []
    result = evaluate(loaded, texts, options, rank, world, lambda name, windows: told.append)
    return asdict(result), sum(told)


@pytest.mark.parametrize(("router", "ep_size"), [("vq", 1), ("vq", 2), ("stablemoe", 2)])
def test_two_ranks_give_the_figures_of_one_also_with_the_experts_between_them(router, ep_size, tmp_path):
    case = config_of("context", vocab=257).model_dump(mode="json")
    config = RunConfig(**{**case, "moe": {**case["moe"], "router": router}})
    with new_folder(tmp_path / "model", False) as folder:
        write_portable(ModelReader(model_of(config)), folder)
    (tmp_path / "text").write_bytes(STORY)
    alone, windows = _on_ranks(0, 1, str(tmp_path), 1)
    for result, told in run_ranks(2, _on_ranks, str(tmp_path), ep_size, timeout=100):
        assert told == windows
        # 3e-5: a standard error is a difference of perplexities near 308, and those agree to 1e-7 of themselves.
        assert _numbers(result) == pytest.approx(_numbers(alone), rel=1e-6, abs=3e-5)


@pytest.mark.parametrize(
    ("case", "router", "layouts"),
    [
        ("context, discrete only", "vq", [(2, 2, 1), (4, 1, 4), (4, 4, 2)]),
        ("layer state", "vq", [(4, 2, 4)]),
        ("context", "stablemoe", [(2, 1, 2), (4, 2, 2)]),
    ],
)
def test_ranks_that_share_windows_give_the_figures_of_one(case, router, layouts, tmp_path):
    sections = config_of(case, vocab=257).model_dump(mode="json")
    sections["model"]["heads"], sections["moe"]["router"] = 4, router
    sections["train"]["sequence_parallel_size"] = 2  # of its training, and of no concern here
    config = RunConfig(**sections)
    with new_folder(tmp_path / "model", False) as folder:
        write_portable(ModelReader(model_of(config)), folder)
    (tmp_path / "text").write_bytes(STORY)
    alone, windows = _on_ranks(0, 1, str(tmp_path), 1, most=1)
    for world, ep_size, sp_size in layouts:
        for result, told in run_ranks(world, _on_ranks, str(tmp_path), ep_size, sp_size, 1, timeout=100):
            assert told == windows
            assert _numbers(result) == pytest.approx(_numbers(alone), rel=1e-6, abs=3e-5)


@pytest.mark.parametrize(
    ("changes", "size", "sentence"),
    [
        ({}, 3, "sequence-parallel size 3 does not divide the 4 ranks of this run"),
        ({}, 4, "sequence-parallel size 4 does not divide model.heads=2"),
        ({"moe": {"router": "expert_choice", "num_experts": 4}}, 2, "expert_choice lets experts choose among all"),
    ],
)
def test_windows_that_cannot_be_shared_are_refused(loaded, changes, size, sentence):
    config = RunConfig(**{**loaded.config.model_dump(mode="json"), **changes})
    with pytest.raises(ConfigError, match=sentence):
        share_windows(replace(loaded, config=config), size, Place(0, 4, 0, 4))


def _numbers(value) -> list[float]:
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []


def _opened(rank: int, world: int) -> str:
    """The checkpoint that a rank loads of a run that gets another tag every time that a rank looks."""
    args, load = command.build_parser("").parse_args(["runs/x"]), mock.Mock(side_effect=StopIteration)
    with (
        mock.patch("vqmoe_ds.checkpoint.open.open_checkpoint", lambda _: SimpleNamespace(path=f"global_step{rank}")),
        mock.patch("vqmoe_ds.checkpoint.load_model.load_model", load),
        pytest.raises(StopIteration),
    ):
        command._score(args, (), Place(rank, world, rank, world), mock.Mock(), torch.device("cpu"))
    return str(load.call_args.args[0])


def test_all_ranks_load_the_checkpoint_that_rank_0_finds() -> None:
    assert run_ranks(2, _opened) == ["global_step0"] * 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--eps", "300"], "--eps is the size of attacks, and none is asked for; add --attacks"),
        (["--attacks", "fgsm", "--eps", "300"], "--eps 300 must lie between 0 and 255"),
        (
            ["--corrupt", "frost"],
            "the kind 'frost' is unknown; known are word_swap, .* of text, and gaussian_noise, .*fog",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_model_is_known(options, sentence):
    args = command.build_parser("").parse_args([".", *options])
    with pytest.raises(ConfigError, match=sentence):
        command._check(args, Place(0, 1, 0, 1))

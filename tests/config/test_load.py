"""Presets, files and overrides become one configuration; mistakes become one sentence."""

import warnings
from typing import Literal

import pytest

from vqmoe_ds.config.fields import RENAMED, option
from vqmoe_ds.config.load import field_table, load_config, parse_override, preset_names, to_yaml
from vqmoe_ds.config.routers import routers
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.runtime.errors import ConfigError


def test_every_preset_loads_and_survives_a_round_trip_through_yaml(tmp_path):
    assert {"tiny", "base", "base-64e", "large"} <= set(preset_names())
    for name in preset_names():
        config = load_config(name).config
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(config))
        assert load_config("tiny", str(file)).config == config


def test_file_overrides_preset_and_set_overrides_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 7, learning_rate: 1e-3}\n")
    loaded = load_config("base", str(file), {"train.steps": 9})
    assert (loaded.config.train.steps, loaded.config.train.learning_rate) == (9, 1e-3)
    assert loaded.config.model.width == 256, "the preset still fills the rest"
    assert loaded.explicit == {"train.steps", "train.learning_rate"}


def test_every_field_has_a_meaning_and_every_size_a_unit():
    for row in field_table():
        assert row.meaning, row.name
        if row.name.endswith(("_steps", "_every", "_tokens", "hidden", "width")):
            assert row.unit, f"{row.name} has no unit"


def test_a_field_is_read_under_its_former_name_from_every_source(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("train: {min_learning_rate: 0.3}\n")
    assert load_config("tiny", str(file)).config.train.min_learning_rate_ratio == 0.3
    told = load_config("tiny", str(file), {"train.min_learning_rate": 0.2})
    assert told.config.train.min_learning_rate_ratio == 0.2
    assert told.explicit == {"train.min_learning_rate_ratio"}
    based = load_config(file=str(file), base={"train": {"min_learning_rate_ratio": 0.4}})
    assert based.config.train.min_learning_rate_ratio == 0.3
    manifest = {"train": {"min_learning_rate": 0.5, "steps": 3}}  # as a checkpoint of before keeps it
    assert RunConfig.model_validate(manifest).train.min_learning_rate_ratio == 0.5
    assert "min_learning_rate_ratio: 0.1" in to_yaml(RunConfig()) and "min_learning_rate:" not in to_yaml(RunConfig())


@pytest.mark.parametrize("former", RENAMED)
def test_every_former_name_is_read_and_noted_once(former, tmp_path):
    section, name = former.split(".")
    current = RENAMED[former].split(".")[1]
    file = tmp_path / "old.yaml"
    file.write_text(f"{section}: {{{name}: 1}}\n")
    for loaded in (load_config("tiny", str(file), {former: 1}), load_config("tiny", None, {former: 1})):
        assert getattr(getattr(loaded.config, section), current) == 1
        assert loaded.notes == (f"{former} is deprecated: write {RENAMED[former]}",)
        assert loaded.explicit == {RENAMED[former]}
        assert name not in loaded.config.model_dump()[section]
    assert not load_config("tiny", None, {RENAMED[former]: 1}).notes
    with pytest.warns(DeprecationWarning, match=f"{former} is deprecated"):
        saved = RunConfig(**{section: {name: 1}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunConfig(**{section: {current: 1}}) == saved


def test_one_option_under_both_its_names_is_refused():
    with pytest.raises(ConfigError, match="birth_step and codebook.init_step are the same field"):
        load_config("tiny", None, {"codebook.birth_step": 3, "codebook.init_step": 5})


def test_a_section_that_holds_no_fields_is_refused_whatever_is_set_in_it(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: 5\n")
    with pytest.raises(ConfigError, match="section model of the configuration must hold fields .* not 5"):
        load_config("tiny", str(file), {"model.layers": 2})


@pytest.mark.parametrize(
    ("preset", "fields", "sentence"),
    [
        ("tiny", {"data.max_tokens": True}, "data.max_tokens=.*: input should be a number"),
        ("tiny", {"train.steps": True}, "train.steps=.*: input should be a number"),
        ("tiny", {"model.image_size": 32}, "sequence_length=128 is not the 64 patches .*; set it to 64"),
        ("vit-cifar", {"model.image_size": 0}, "label_smoothing is for images .*; set it to 0"),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence(preset, fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(preset, None, fields)


def test_one_field_under_both_its_names_is_refused(tmp_path):
    file = tmp_path / "both.yaml"
    for text in (
        "{min_learning_rate: 0.3, min_learning_rate_ratio: 0.3}",
        "{min_learning_rate_ratio: 1, min_learning_rate: 0}",
    ):
        file.write_text(f"train: {text}\n")
        with pytest.raises(ConfigError, match="train.min_learning_rate and train.min_learning_rate_ratio are the same"):
            load_config("tiny", str(file))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("moe: {num_expert: 3}", "moe.num_expert is unknown; did you mean moe.num_experts?"),
        ("mo: {num_experts: 3}", "configuration key mo is unknown; did you mean moe?"),
        ("moe: {num_experts: many}", "moe.num_experts='many'"),
        ("train: {learning_rate: -1}", "train.learning_rate=-1"),
        ("model: {heads: 3}", "model.heads=3 must divide model.width=128"),
        ("model: {head_width: 7}", "model.head_width=7 must be even"),
        ("moe: {top_k: 17}", "moe.top_k=17 exceeds moe.num_experts=16"),
        ("moe: {code_blend: 1.0}", "codebook.source=layer_state"),
        ("codebook: {source: layer_states}", "layer_state"),
        ("- a list", "must hold sections"),
        ("model: 3", "section model of the configuration must hold fields (name: value, one a line), not 3"),
        ("bf16: {enabled: true}", "configuration key bf16 is unknown; did you mean train.precision?"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_the_place(tmp_path, text, sentence):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", str(file))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_preset_and_missing_file_and_malformed_set():
    with pytest.raises(ConfigError, match="did you mean base"):
        load_config("bas")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        load_config("tiny", "nowhere.yaml")
    with pytest.raises(ConfigError, match="section.field=value"):
        parse_override("num_experts=3")
    with pytest.raises(ConfigError, match=r"did you mean moe\.num_experts\?"):
        load_config("tiny", None, dict([parse_override("moe.num_exprts=3")]))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("weight_decay=0.1", "; did you mean train.weight_decay?"),
        ("decay=0.1", "; did you mean router.decay or codebook.decay?"),
        ("lr=0.1", "; did you mean train.learning_rate?"),
        ("bf16.enabled=true", "no such field; did you mean train.precision?"),
        ("zero_optimization.offload_optimizer.device=cpu", "; it is zero_optimization of the DeepSpeed JSON"),
        ("optimizer.params.lr=0.1", "; did you mean train.learning_rate?"),
    ],
)
def test_names_without_their_section_and_those_of_the_json_lead_to_ours(given, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", None, dict([parse_override(given)]))
    assert str(caught.value).endswith(sentence)


def test_an_option_of_a_plug_in_that_is_missing_leads_to_the_plug_in(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("moe: {router: sigmoid}\n")
    for given, path in (({"moe.router": "sigmoid"}, None), ({}, str(file))):
        with pytest.raises(ConfigError, match="^moe.router='sigmoid' is unknown; .* --plugin FILE.py"):
            load_config("tiny", path, {**given, "router.rate": 0.01})
    for router in ("vq", [1]):
        with pytest.raises(ConfigError, match="--set router.rate: no such field; did you mean router.gated"):
            load_config("tiny", None, {"moe.router": router, "router.rate": 0.01})


def test_choices_of_a_plug_in_may_be_numbers(monkeypatch):
    class Options(routers()["topk"].Options):
        power: Literal[1, 2, None] = option(1, "of the scores")

    monkeypatch.setattr(routers()["topk"], "Options", Options)
    row = next(row for row in field_table() if row.name == "router.power")
    assert row.told.endswith(": of the scores (choices: 1, 2, none)")


def test_none_is_read_as_help_shows_it_and_stays_a_choice_where_it_is_one(tmp_path):
    names = ("data.path", "data.valid_path", "run.log_to", "router.path", "data.augment")
    given = dict(parse_override(f"{name}=none") for name in names)
    config = load_config("tiny", None, {**given, "moe.router": "token_table"}).config
    assert (config.data.path, config.data.valid_path, config.run.log_to) == (None,) * 3
    assert config.router.model_dump()["path"] is None
    assert config.data.augment == "none"


def test_a_section_whose_fields_are_commented_out_is_empty(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  # width: 64\ntrain:\n  steps: 7\n")
    assert load_config("tiny", str(file)).config.train.steps == 7


@pytest.mark.parametrize(
    "written, meant",
    [
        ("hf:owner/name", "hub:owner/name"),
        ("hf:owner/name:test", "hub:owner/name::test"),
        ("hf:owner/name:plain:test", "hub:owner/name:plain:test"),
        ("hub:owner/name:plain", "hub:owner/name:plain"),
        ("text.txt", "text.txt"),
    ],
)
def test_sets_of_the_hub_may_be_written_as_elsewhere(written, meant):
    data = load_config("tiny", None, {"data.path": [written], "data.valid_path": written}).config.data
    assert (data.path, data.valid_path) == ([meant], meant)

"""benchmarks/best_rates.py: what is chosen, what is compared, and that its grids try published routers."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import yaml

from vqmoe_ds.config.load import load_config
from vqmoe_ds.experiments.grid import overrides_of, read_grid, runs_of
from vqmoe_ds.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GRIDS = ROOT / "benchmarks/grids"
RATES = read_grid(str(GRIDS / "rates.yaml"))
LOSSES = {0.003: [2.8, 2.7], 0.006: [2.6, 2.7], 0.012: [2.7, 2.9]}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("best_rates", ROOT / "benchmarks/best_rates.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_grid_tries_routers_of_the_controls_and_nothing_else_differs():
    controls = read_grid(str(GRIDS / "controls.yaml"))
    known = {entry.name: entry for entry in controls.entries}
    assert all(entry == known[entry.name] for entry in RATES.entries) and len(RATES.entries) == 7
    assert [fields["train.learning_rate"] for fields in RATES.corpora.values()] == [0.003, 0.006, 0.012, 0.024, 0.048]
    for fields in RATES.corpora.values():
        both = {**RATES.overrides, **fields, "train.learning_rate": 0.006}
        assert both == {**controls.overrides, **controls.corpora["enwiki-mini"]}
    assert (len(runs_of(RATES, Path("out"))), len(RATES.entries) * 5) == (70, 35), "as the header counts them"


def test_the_grid_of_published_routers_has_those_of_the_comparison_with_a_norm_for_all():
    names = ("routers.yaml", "controls.yaml", "published-rates.yaml")
    routers, controls, published = (read_grid(str(GRIDS / name)) for name in names)
    known = {entry.name: entry for entry in [*controls.entries, *routers.entries]}
    assert all(entry == known[entry.name] for entry in published.entries) and len(published.entries) == 11
    assert [fields["train.learning_rate"] for fields in published.corpora.values()] == [0.006, 0.012, 0.024, 0.048]
    for fields in published.corpora.values():
        both = {**published.overrides, **fields, "train.learning_rate": 0.006, "moe.output_norm": False}
        assert both == {**routers.overrides, **routers.corpora["enwiki-mini"]}
    assert (len(runs_of(published, Path("out"))), len(published.entries) * 5) == (88, 55), "as the header counts them"


def test_the_grid_of_robustness_has_the_published_routers_at_one_setting():
    published, words = (read_grid(str(GRIDS / name)) for name in ("published-rates.yaml", "robustness.yaml"))
    known = {entry.name: entry.overrides for entry in published.entries}
    asked = {entry.name: entry.overrides for entry in words.entries if not entry.name.startswith("VQ")}
    assert asked == {name: known[name] for name in asked} and len(words.entries) == 9
    assert words.overrides | {"codebook.code_map": "balanced"} == published.overrides | {"train.learning_rate": 0.006}
    assert words.evaluate is not None and published.evaluate is not None
    assert words.evaluate.corrupt == published.evaluate.corrupt == ["word_swap_line:0.025", "char_noise:0.05"]
    assert len(runs_of(words, Path("out"))) == 27, "as the header counts them"


def test_the_grid_of_words_is_the_small_size_of_the_verdict_but_for_the_rate():
    verdict, words = (read_grid(str(GRIDS / f"{name}.yaml")) for name in ("verdict", "word-rates"))
    known = {entry.name: entry for entry in verdict.entries}
    assert all(entry == known[entry.name] for entry in words.entries) and len(words.entries) == 5
    small = {**verdict.overrides, **verdict.corpora["small"]}
    for fields in words.corpora.values():
        assert {**words.overrides, **fields, "train.learning_rate": 0.006} == small
    assert [fields["train.learning_rate"] for fields in words.corpora.values()] == [0.003, 0.006, 0.012]
    assert (len(runs_of(words, Path("out"))), len(words.entries) * 3) == (30, 15), "as the header counts them"


def test_the_grid_of_norms_is_the_wide_size_of_the_verdict_with_and_without():
    verdict, norms = (read_grid(str(GRIDS / f"{name}.yaml")) for name in ("verdict", "norms"))
    known = {entry.name: entry for entry in verdict.entries}
    *entries, top_2, both, one = norms.entries
    for entry in entries:
        plain = known[entry.name.replace("top-2 normed", "top-2 balanced").removesuffix(" normed")]
        added = {"moe.output_norm": True} if entry.name.endswith(" normed") else {}
        assert entry.overrides == {**plain.overrides, **added} and entry.group == plain.group
    wide = {**verdict.overrides, **verdict.corpora["large"]}
    for rate, fields in zip((0.006, 0.012, 0.024), norms.corpora.values(), strict=True):
        assert {**norms.overrides, **fields} == {**wide, "train.learning_rate": rate}
    once = {entry.name: entry for entry in entries}
    for entry in (top_2, both, one):
        assert entry.overrides == once[entry.name.replace("afresh", "normed")].overrides
        assert entry.corpora == ["English in words at 0.012"] and not {*entry.seeds} & {*norms.seeds}
    assert len(runs_of(norms, Path("out"))) == 87, "as the header counts them"


def test_the_grid_of_128_experts_is_the_end_of_the_scaling_grid_but_for_the_rate_and_the_norm():
    scaling, many = (read_grid(str(GRIDS / f"{name}.yaml")) for name in ("scaling", "expert-rates"))
    known = {entry.name: entry for entry in scaling.entries}
    norm = {"moe.output_norm": True}
    for entry in many.entries:
        assert entry.group == known[entry.name].group
        assert {**entry.overrides, **norm} == {**known[entry.name].overrides, **norm}
    assert len(many.entries) == 3
    (text,) = scaling.corpora.values()
    for rate, fields in zip((0.003, 0.006, 0.012), many.corpora.values(), strict=True):
        assert fields == {**text, "train.learning_rate": rate}
        assert {**many.overrides, "train.learning_rate": 0.006} == {**scaling.overrides, **norm}
    assert (len(runs_of(many, Path("out"))), len(many.entries) * 3) == (18, 9), "as the header counts them"


def test_the_least_mean_loss_chooses_and_a_rate_that_failed_does_not(tool):
    assert tool.choose({"a": LOSSES}) == {"a": 0.006}
    assert tool.choose({"a": LOSSES, "b": {0.003: [2.8, 2.7], 0.006: [2.0]}}) == {"a": 0.006, "b": 0.003}
    assert tool.choose({"a": {**LOSSES, 0.006: [2.0, math.nan]}}) == {"a": 0.003}
    with pytest.raises(ConfigError, match="b has no learning rate with 2 finished runs"):
        tool.choose({"a": LOSSES, "b": {0.003: [1.0], 0.006: [math.inf, 1.0]}})


def test_the_second_round_has_fresh_seeds_the_best_rates_and_each_corpus_once(tool):
    best = {entry.name: 0.003 for entry in RATES.entries} | {"top-2 normed": 0.012}
    others = {f"other at {rate}": {"data.path": "other", "train.learning_rate": rate} for rate in (0.003, 0.012)}
    grid = tool.grid_of_the_best(RATES.model_copy(update={"corpora": RATES.corpora | others}), best, [4, 5, 6])
    assert list(grid.corpora) == ["enwiki-mini", "other"] and grid.groups == RATES.groups
    for run in runs_of(grid, Path("out")):
        config = load_config(grid.preset, None, overrides_of(grid, run)).config
        assert config.train.learning_rate == (0.012 if run.entry.name == "top-2 normed" else 0.003)
        assert config.train.seed in (4, 5, 6)
    with pytest.raises(ConfigError, match="top-2 normed has no finished run"):
        tool.grid_of_the_best(RATES, {name: rate for name, rate in best.items() if name != "top-2 normed"}, [4])
    published = read_grid(str(GRIDS / "published-rates.yaml")).model_copy(update={"corpora": {}})
    stale = tool.choose(tool.losses_of(published, _sections(list(RATES.corpora))))
    with pytest.raises(ConfigError, match="has no finished run"):
        tool.grid_of_the_best(published, stale, [4])


REFUSED = {
    "a seed that chooses": (
        {},
        [2, 4],
        "--seeds 2: give distinct ones from 0 on, other than 1, 2, which choose the rates",
    ),
    "a seed twice": ({}, [4, 4], "--seeds 4: give distinct ones"),
    "a negative seed": ({}, [-1], "--seeds -1: give distinct ones"),
    "an entry's seeds": (
        {"entries": {"seeds": [4]}},
        [5],
        "entry top-2 balanced has seeds, corpora or a train.learning_r",
    ),
    "an entry's corpora": (
        {"entries": {"corpora": ["enwiki-mini at 0.003"]}},
        [4],
        "entry top-2 balanced has seeds, corp",
    ),
    "an entry's rate": (
        {"entries": {"set": {"train.learning_rate": 0.1}}},
        [4],
        "entry top-2 balanced has seeds, corp",
    ),
    "no rate": (
        {"corpora": {"a at 1": {}}},
        [4],
        "corpus a at 1: name corpora TEXT at RATE, set their train.learning_rate",
    ),
    "no name": ({"corpora": {"low": {"train.learning_rate": 1}}}, [4], "corpus low: name corpora TEXT at RATE"),
    "two settings": (
        {"corpora": {f"a at {r}": {"train.learning_rate": r, "train.steps": r} for r in (1, 2)}},
        [4],
        "corpus a at 2: name corpora TEXT at RATE",
    ),
}


@pytest.mark.parametrize("change, seeds, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_chosen_or_compared_is_refused_before_the_first_run(
    tool, tmp_path, monkeypatch, capsys, change, seeds, message
):
    grid = yaml.safe_load((GRIDS / "rates.yaml").read_text("utf-8"))
    grid["entries"][0] |= change.get("entries", {})
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid | {"corpora": change.get("corpora", grid["corpora"])}))
    monkeypatch.setattr(tool.compare, "main", None)
    arguments = ["--grid", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out"), "--seeds", *map(str, seeds)]
    assert tool.main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def _sections(corpora: list[str]) -> list[dict]:
    """A report in which every router is best at 0.048."""
    losses = {corpus: 3 - RATES.corpora[corpus]["train.learning_rate"] for corpus in corpora}
    entries = [entry.name for entry in RATES.entries]
    return [
        {"corpus": c, "entries": {name: {"by_seed": {"clean": {"1": loss, "2": loss}}} for name in entries}}
        for c, loss in losses.items()
    ]


def test_one_command_tries_chooses_and_compares(tool, tmp_path, monkeypatch, capsys):
    asked = []

    def run(args):
        out = Path(args.out)
        asked.append((out.name, read_grid(args.grid), args.jobs))
        out.mkdir()
        (out / "report.json").write_text(json.dumps(_sections(list(RATES.corpora))))
        return 0

    monkeypatch.setattr(tool.compare, "main", run)
    assert tool.main(["--out", str(tmp_path), "--jobs", "2"]) == 0
    (first, tried, _), (second, compared, jobs) = asked
    assert (first, second, jobs) == ("tried", "best", 2) and tried == RATES
    assert compared.seeds == [4, 5, 6]
    assert {entry.overrides["train.learning_rate"] for entry in compared.entries} == {0.048}
    assert "top-2 normed: 0.048, an end of the rates tried" in capsys.readouterr().out


@pytest.mark.parametrize("code", [1, 2, 75])
def test_a_first_round_without_a_result_ends_the_command(tool, tmp_path, monkeypatch, code):
    monkeypatch.setattr(tool.compare, "main", lambda args: code)
    assert tool.main(["--out", str(tmp_path)]) == code
    assert not (tmp_path / "best.yaml").exists()

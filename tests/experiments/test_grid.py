"""What a grid may say, what it becomes, and the one sentence for what cannot work."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.plugins import loaded
from vqmoe_ds.experiments.compare import build_parser, main
from vqmoe_ds.experiments.grid import overrides_of, read_grid, runs_of
from vqmoe_ds.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GRID: dict[str, Any] = {
    "ds_config": str(ROOT / "ds_configs/zero0.json"),
    "set": {"model.layers": 2, "model.width": 32, "model.heads": 2, "model.sequence_length": 32, "train.steps": 4},
    "seeds": [1, 2],
    "corpora": {"words": {}},
    "groups": {"all": {"baselines": ["top-2"], "tolerance": 0.1}},
    "entries": [
        {"name": "top-2", "set": {"moe.router": "topk", "moe.top_k": 2}},
        {"name": "codes", "set": {"moe.router": "vq", "moe.top_k": 1}},
    ],
}


@pytest.fixture
def grid_file(tmp_path):
    (tmp_path / "words.txt").write_text("a few little words " * 400)

    def write(change=lambda grid: None) -> str:
        grid = copy.deepcopy(GRID)
        grid["corpora"]["words"]["data.path"] = str(tmp_path / "words.txt")
        change(grid)
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(grid))
        return str(path)

    return write


def compare(grid: str, out: Path, *more: str) -> int:
    return main(build_parser("").parse_args([grid, "--out", str(out), *more]))


def test_runs_are_numbered_seed_by_seed_and_the_special_override_wins(grid_file, tmp_path):
    grid = read_grid(grid_file(lambda g: g["entries"][1].update(seeds=[2])))
    runs = runs_of(grid, tmp_path)
    assert [(r.index, r.entry.name, r.seed) for r in runs] == [(0, "top-2", 1), (1, "top-2", 2), (2, "codes", 2)]
    assert overrides_of(grid, runs[2]) | {"moe.router": "vq", "train.seed": 2} == overrides_of(grid, runs[2])
    assert runs[2].folder == tmp_path / "words/codes/seed-2"


def test_list_prints_a_line_for_every_run(grid_file, tmp_path, capsys):
    assert compare(grid_file(), tmp_path / "out", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[str(i), "new"] for i in range(4)]
    assert "words | codes | seed 2" in lines[3]
    assert not (tmp_path / "out").exists()


def _rename(grid):
    grid["entries"][1]["name"] = "Top 2"


def _expert_choice(grid):
    grid["entries"][1]["set"] = {"moe.router": "expert_choice", "moe.top_k": 2}


def _table(grid):
    grid["entries"][1]["set"] = {"moe.router": "hash_and_code", "router.path": "/nowhere"}


def _plug_in(grid):
    grid["entries"][1]["set"] = {"moe.router": "sigmoid", "router.rate": 0.01}


def _text_sample(grid):
    _expert_choice(grid)
    grid["groups"]["all"]["noncausal"] = True
    grid["entries"][1]["set"]["run.sample_tokens"] = 20


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda g: g.update(seed=[1]), "unknown key seed; did you mean seeds?"),
        (lambda g: g["entries"][0].update(sets={}), "unknown key entries.0.sets; did you mean set?"),
        (lambda g: g["groups"]["all"].update(tolerence=1), "did you mean tolerance?"),
        (lambda g: g["entries"][1]["set"].update({"moe.topk": 1}), "did you mean moe.top_k?"),
        (_plug_in, "corpus words: moe.router='sigmoid' is unknown; known: "),
        (lambda g: g.update(seeds=[]), "the grid has no seeds"),
        (lambda g: g.update(seeds=[3, 1, 3]), "names seed 3 twice"),
        (lambda g: g.update(seeds=[-1]), "seeds.0: input should be greater than or equal to 0"),
        (lambda g: g.update(seeds=list(range(60_000))), "has 120,000 runs, and 100,000 are the most"),
        (lambda g: g.update(seeds=[*range(90_000), 7]), "has 180,002 runs"),
        (lambda g: g["entries"][0].update(name="..", seeds=[1]), "entries.0.name: string should match pattern"),
        (lambda g: g["entries"][0].update(name="x" * 300), "entries.0.name: string should have at most 200"),
        (lambda g: g["groups"]["all"].update(tolerance=float("inf")), "groups.all.tolerance is inf"),
        (lambda g: g["entries"][1]["set"].update({"model.layers": 10**9}), "model.layers=1000000000"),
        (lambda g: g.update(entries=[]), "has no entry; there is nothing to run"),
        (_rename, "more than one entry is named"),
        (lambda g: g["entries"][1].update(group="al"), "unknown group 'al'; did you mean all?"),
        (lambda g: g["groups"]["all"].update(baselines=["top-1"]), "did you mean top-2?"),
        (lambda g: g["groups"]["all"].update(other_budgets=["codes"]), "is no entry outside group 'all'"),
        (lambda g: g["entries"][1].update(corpora=["word"]), "did you mean words?"),
        (lambda g: g["entries"][1].update(corpora=[]), "entry codes has no corpora; leave the key out"),
        (lambda g: g.update(evaluate={"attacks": ["fgsm"], "eps": []}), "evaluate.eps: list should have at least 1"),
        (lambda g: g["corpora"]["words"].update({"data.path": "/nowhere"}), "data path /nowhere does not exist"),
        (lambda g: g.update(evaluate={"corrupt": ["word_swop"]}), "'word_swop' is unknown"),
        (lambda g: g.update(evaluate={"shift": ["/nowhere"]}), "evaluate: shift: data path /nowhere does not exist"),
        (lambda g: g.update(evaluate={"shift": ["/dev/null"]}), "evaluate: shift: data file /dev/null cannot be read"),
        (_table, "entry codes: router.path=/nowhere does not exist; make that table first"),
        (lambda g: g["groups"]["all"].update(baselines=["top-2", "top-2"]), "group 'all' names a baseline twice"),
        (lambda g: g["groups"]["all"].update(tolerance=0.0), "entry codes has"),
        (_expert_choice, "not marked noncausal: true, needs a router that sees no later token"),
        (_text_sample, "generating text, needs a router that sees no later token"),
    ],
)
def test_bad_grids_are_refused_in_one_sentence_before_anything_runs(grid_file, tmp_path, capsys, change, sentence):
    assert compare(grid_file(change), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_work_are_refused_before_anything_runs(grid_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compare(grid_file(), tmp_path / "out", "--jobs", "0") == 2
    assert compare(grid_file(), tmp_path / "file/out") == 2
    (tmp_path / "empty.yaml").write_text("")
    assert compare(str(tmp_path / "empty.yaml"), tmp_path / "out") == 2
    jobs, out, empty = capsys.readouterr().err.splitlines()
    assert jobs == "error: --jobs 0: give 1 or more"
    assert "cannot be made" in out and "file is not a folder" in out and out.endswith("name another")
    assert "has no keys; give ds_config, seeds, corpora and entries" in empty


def test_unequal_budgets_name_the_entry_the_figure_and_the_mend(grid_file, tmp_path, capsys):
    assert compare(grid_file(lambda g: g["entries"][1]["set"].update({"moe.top_k": 3})), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "unequal budgets in group 'all': entry codes has" in error
    assert "FLOPs a token, +" in error
    assert "the tolerance is 10.00%" in error
    assert compare(grid_file(lambda g: g["entries"][1].update(group="other")), tmp_path / "out", "--list") == 2
    apart = grid_file(lambda g: (g["entries"][1].update(group="other"), g["groups"].update(other={})))
    assert compare(apart, tmp_path / "out", "--report_only") == 0, "another group is another budget"


def test_a_corpus_that_sets_the_size_of_models_has_budgets_of_its_own(grid_file, tmp_path, capsys):
    def widen(grid):
        (fields,) = grid["corpora"].values()
        grid["corpora"]["wide"] = {**fields, "model.width": 2 * grid["set"]["model.width"]}

    assert compare(grid_file(widen), tmp_path / "out", "--report_only") == 0
    shown = dict(re.findall(r"codes on (.*): ([\d,]+) \|", capsys.readouterr().out))
    assert len(shown["wide"]) > len(shown["words"]) > 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--only", "code"], "--only code: the grid has no such entry; did you mean codes?"),
        (["--index", "4"], "the grid has runs 0 to 3"),
    ],
)
def test_options_that_name_nothing_are_refused(grid_file, tmp_path, capsys, more, sentence):
    assert compare(grid_file(), tmp_path / "out", *more) == 2
    assert sentence in capsys.readouterr().err


def test_files_that_are_no_grid(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    for path, sentence in (("none.yaml", "cannot be read"), ("list.yaml", "has no keys; give ds_config")):
        with pytest.raises(ConfigError, match=sentence):
            read_grid(str(tmp_path / path))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/grids").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_grids_of_the_repository_are_whole(path):
    from vqmoe_ds.config.load import load_config

    grid = read_grid(str(path))
    tried = loaded(ROOT / "benchmarks/tried_routers.py", "expert_threshold", "hash_and_pair", "hash_and_mix")
    with loaded(ROOT / "benchmarks/two_hashes.py", "two_hashes"), tried:
        for run in runs_of(grid, Path("out")):
            load_config(run.entry.preset or grid.preset, None, overrides_of(grid, run))


@pytest.mark.parametrize("name", ["controls", "verdict", "table1", "acmoe"])
def test_the_grids_of_the_verdicts_compare_equal_budgets_and_mark_what_looks_ahead(name):
    from vqmoe_ds.config.load import load_config
    from vqmoe_ds.experiments.budget import budget_of, check_group

    grid = read_grid(str(ROOT / f"benchmarks/grids/{name}.yaml"))
    first = {run.entry.name: run for run in reversed(runs_of(grid, Path("out")))}
    sizes = {"controls": 256, "verdict": 8192, "table1": 256, "acmoe": 267736}
    vocabulary = {"model.vocab_size": sizes[name]}  # the data tell it otherwise
    configs = {
        entry.name: load_config(
            entry.preset or grid.preset, None, {**overrides_of(grid, first[entry.name]), **vocabulary}
        ).config
        for entry in grid.entries
    }
    for group, settings in grid.groups.items():
        members = {e.name: budget_of(configs[e.name]) for e in grid.entries if e.group == group}
        check_group(group, members, (settings.baselines or list(members))[0], settings.tolerance)
        ahead = {e.name for e in grid.entries if e.group == group and configs[e.name].looks_ahead is not None}
        assert settings.noncausal is bool(ahead), f"{group}: {ahead}"


def test_the_released_entries_keep_the_released_layer_and_take_the_training_of_their_grid():
    from vqmoe_ds.config.load import load_config

    released = load_config("released").config
    for name in ("controls", "verdict"):
        grid = read_grid(str(ROOT / f"benchmarks/grids/{name}.yaml"))
        by_entry = {run.entry.name: run for run in runs_of(grid, Path("out"))}
        ours, theirs = (
            load_config(by_entry[entry].entry.preset or grid.preset, None, overrides_of(grid, by_entry[entry])).config
            for entry in ("released", "top-2 balanced")
        )
        assert ours.codebook == released.codebook and ours.router == released.router
        assert ours.moe.model_copy(update={"expert_hidden": 344}) == released.moe
        assert ours.train == theirs.train and ours.model == theirs.model, "so that the layer alone is compared"

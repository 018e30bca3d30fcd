"""docs/papers.md: commands parse, arithmetic and planned hours are right, figures are those of other pages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from vqmoe_ds.config.load import load_config, parse_override
from vqmoe_ds.data import prepare, tokenizer_training
from vqmoe_ds.evaluation import command as evaluation
from vqmoe_ds.experiments import compare
from vqmoe_ds.experiments.grid import read_grid, runs_of
from vqmoe_ds.finetune import cli as finetuning
from vqmoe_ds.planning import command as planning
from vqmoe_ds.planning.parameters import count

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/papers.md").read_text("utf-8")
RECORDING = """
python() { printf '%s\\037' "$@" >> "$RECORD"; echo >> "$RECORD"; }
sbatch() { python sbatch "$@"; }
nice() { "$@"; }
head() { :; }
tail() { :; }
"""
"""Commands of the page by the shell that would run them, loops and variables included; nothing is started."""
PLANS = re.findall(r"^    python tools/plan\.py (.*?) +# (\S+)$", PAGE, re.MULTILINE)


def _load(file: str):
    sys.path.insert(0, str((ROOT / file).parent))
    spec = importlib.util.spec_from_file_location(f"papers_{Path(file).stem}", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which the page's paths exist, without a SLURM."""
    for name in ("benchmarks", "launchers"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("enwik8", "imagenet"):
        (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    return tmp_path


@pytest.fixture
def commands(tmp_path):
    """The words of every command of the page."""
    code = "\n".join(line for line in PAGE.splitlines() if line.startswith("    "))
    (tmp_path / "data/enwik8").mkdir(parents=True)
    environment = {**os.environ, "RECORD": str(tmp_path / "record")}
    subprocess.run(["bash", "-euc", RECORDING + code], check=True, cwd=tmp_path, env=environment)
    lines = (tmp_path / "record").read_text().splitlines()
    subprocess.run(["rm", "-r", str(tmp_path / "data"), str(tmp_path / "record")], check=True)
    return [line.split("\037")[:-1] for line in lines]


def _check_comparison(words: list[str], array: str | None) -> None:
    args = compare.build_parser("").parse_args(words)
    runs = len(runs_of(read_grid(args.grid), Path("out")))
    assert array is None or array.partition("%")[0] == f"0-{runs - 1}", f"{args.grid} has {runs} runs"


def _check_job(submit, words: list[str]) -> None:
    args = submit.build_parser().parse_args(words)
    if args.job == "finetune":
        options = finetuning.build_parser("").parse_args(args.rest)
        Path(options.checkpoint).mkdir(parents=True, exist_ok=True)
        load_config("tiny", None, dict(parse_override(text) for text in options.set))
    submit.check(args)
    assert "#SBATCH --gpus-per-node=" in submit.render(args)
    if args.job == "compare":
        _check_comparison(args.rest, args.array)
    if args.job == "evaluate":
        evaluation.build_parser("").parse_args(args.rest)


def test_every_command_of_the_page_parses_and_its_settings_and_arrays_are_those_of_the_grids(commands, folder):
    submit, best_rates, savings = map(
        _load, ("launchers/slurm/submit.py", "benchmarks/best_rates.py", "benchmarks/discrete_path.py")
    )
    kinds = Counter(name for name, *_ in commands)
    for name, *words in commands:
        if name == "launchers/slurm/submit.py":
            _check_job(submit, words)
        elif name == "sbatch":
            array, gpus, script, *rest = words
            assert gpus == "--gpus-per-node=1" and Path(script).is_file()
            _check_comparison(rest, array.removeprefix("--array="))
        elif name == "tools/compare_routers.py":
            _check_comparison(words, None)
        elif name == "tools/plan.py":
            args = planning.build_parser("").parse_args(words)
            load_config(args.preset, None, dict(parse_override(text) for text in args.set))
        elif name == "benchmarks/best_rates.py":
            compare.build_parser("").parse_args(["grid", "--out", "out", *best_rates.parse(words)[1]])
        else:
            parsers = {
                "tools/prepare_data.py": prepare.build_parser(""),
                "tools/train_tokenizer.py": tokenizer_training.build_parser(""),
            }
            parsers[name].parse_args(words) if name in parsers else savings.parse(words)
    assert kinds["launchers/slurm/submit.py"] == 25 and kinds["tools/prepare_data.py"] == 3, "loops are followed"
    assert kinds["tools/plan.py"] == len(PLANS) == 8


@pytest.mark.parametrize(("options", "name"), PLANS, ids=[name for _, name in PLANS])
def test_the_hours_are_those_of_the_planner(options, name, capsys):
    (row,) = re.findall(rf"^\| {name}(?: \([^|]*\))? \| (.*) \|$", PAGE, re.MULTILINE)
    stored, shape, seconds, steps, hours, together = row.split(" | ")
    args = planning.build_parser("").parse_args(options.split())
    assert planning.main(args) == 0
    plan = json.loads(capsys.readouterr().out)
    run = load_config(args.preset, None, dict(parse_override(text) for text in args.set)).config
    layout = plan["layouts"][0]
    runs, gpus = map(int, shape.split(" × "))
    assert layout["fits"] and gpus == args.nodes * args.gpus_per_node
    assert (stored, steps) == (f"{plan['parameters']['stored']:,}", f"{run.train.steps:,}")
    assert float(seconds) == pytest.approx(layout["step_seconds"], rel=0.05)
    exact = float(seconds) * run.train.steps / 3600
    assert float(hours) == pytest.approx(exact, abs=0.006)
    assert float(together) == pytest.approx(runs * gpus * exact, abs=0.06)


def test_the_arithmetic_of_the_page_is_right():
    found = re.findall(r"([\d.,]*\d(?: [×/] [\d.,]*\d)+) = ([\d.,]*\d)( %)?", PAGE)
    assert len(found) > 15
    for formula, result, percent in found:
        value = eval(formula.replace(",", "").replace("×", "*"))  # digits, points and signs, by the pattern
        digits = len(result.partition(".")[2])
        assert f"{value * (100 if percent else 1):,.{digits}f}" == result, formula


def test_parameters_are_those_that_the_models_have():
    arms = {run.entry.name: run for run in runs_of(read_grid(str(ROOT / "benchmarks/grids/routers.yaml")), Path("out"))}
    fields = read_grid(str(ROOT / "benchmarks/grids/routers.yaml")).overrides | arms["VQ dual path"].entry.overrides
    for preset, changes in (
        ("released", {}),
        ("released", {"model.vocab_size": 267736}),
        ("large", {}),
        ("switch-m", {}),
        ("tiny", {"model.vocab_size": 8192, "model.sequence_length": 256}),
        ("tiny", fields),
    ):
        stored = count(load_config(preset, None, changes).config).stored
        assert f"{stored:,}" in PAGE, f"{preset}: {stored:,}"


def test_figures_are_those_of_the_pages_that_show_how_they_were_measured():
    results, tasks, gpu, vision = (
        (ROOT / "docs" / name).read_text("utf-8") for name in ("results.md", "finetuning.md", "gpu.md", "vision.md")
    )
    intervals = re.findall(r"[+−]\d\.\d{3,4} \[[^\]]+\]", PAGE)
    assert len(intervals) == 32
    for interval in intervals:
        assert interval in results, interval
    points = re.findall(r"\[[+−]\d\.\d, [+−]\d\.\d\]", PAGE)
    assert len(points) == 13 and all(point in tasks for point in points[:3]) and all(p in vision for p in points[3:])
    for figure in ("(-32.4%)", "**-28.4%**", "7.54 M"):
        assert figure in tasks
    assert "A step of 41 ms" in gpu and "| 73.6 | 83.8 | 138 |" in gpu and "67.2" in gpu


def test_switch_m_has_the_parameters_of_its_release():
    width, words, layers, experts = 352, 267735, 6, 16
    expert = 2 * width * width + 2 * width  # two matrices with biases, hidden width 352
    theirs = 2 * words * width + layers * (experts * expert + 4 * width * width)
    run = load_config("switch-m").config
    assert count(run).stored == pytest.approx(theirs, rel=0.002)
    assert run.rows_per_token == 2 and run.router.model_dump()["plain_layers"] == 2
    assert (run.train.steps, run.train.batch_size, run.model.sequence_length) == (80_000, 96, 512)


def test_softmoe_vit_has_its_experts_and_clusters_where_its_release_has_them():
    run = load_config("softmoe-vit").config
    assert run.model.moe_blocks == [6, 7, 8, 9, 10, 11], "the first of these is plain, as it has none before it"
    assert (run.moe.num_experts, run.router.model_dump()["slots"], run.model.sequence_length) == (128, 1, 196)
    assert run.train.batch_size == 4 * 128

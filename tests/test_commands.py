"""Console commands: one for each file of ``launchers/`` and ``tools/``, from a checkout and from a wheel alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vqmoe_ds.commands import usage
from vqmoe_ds.config.deepspeed_json import read_deepspeed_json
from vqmoe_ds.runtime.parents import Process

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DOORS = [*(ROOT / "launchers").glob("*.py"), *(ROOT / "tools").glob("*.py")]
SMALL = {
    **{"train.steps": 2, "train.batch_size": 4, "moe.num_experts": 4, "moe.expert_hidden": 32, "codebook.num_codes": 4},
    **{"model.layers": 1, "model.width": 32, "model.heads": 2, "model.sequence_length": 32},
    **{"run.final_eval_windows": 4, "run.sample_tokens": 0, "run.eval_batches": 1, "run.probe_tokens": 0},
}
OPTIONS = ["--data", "t.txt", *[f"--set={name}={value}" for name, value in SMALL.items()]]


def test_every_file_has_a_console_command_of_one_scheme():
    modules = {path.stem for path in (ROOT / "vqmoe_ds/commands").glob("*.py")} - {"__init__"}
    called = [re.findall(r"from vqmoe_ds\.commands\.(\w+) import main", path.read_text("utf-8")) for path in DOORS]
    assert sorted(called) == [[name] for name in sorted(modules)]
    wanted = {f"vqmoe-{name.replace('_', '-')}": f"vqmoe_ds.commands.{name}:main" for name in modules}
    assert PROJECT["scripts"] == wanted
    told = (ROOT / "tools/README.md").read_text("utf-8")
    assert all(f"`{command}`" in told for command in wanted)


@pytest.mark.parametrize(
    ("started", "examples"),
    [
        ("/usr/bin/vqmoe-convert", "vqmoe-convert a b\ndeepspeed --no_python vqmoe-convert\nvqmoe-convert-all"),
        ("tools/convert_checkpoint.py", "python {0} a b\ndeepspeed {0}\nvqmoe-convert-all"),
        ("/lib/vqmoe_ds/commands/convert.py", "python -m {1} a b\ndeepspeed --module {1}\nvqmoe-convert-all"),
    ],
)
def test_examples_start_a_command_as_it_was_started(started, examples, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    written = "vqmoe-convert a b\ndeepspeed --no_python vqmoe-convert\nvqmoe-convert-all"
    assert usage(written) == examples.format("tools/convert_checkpoint.py", "vqmoe_ds.commands.convert")


@pytest.mark.parametrize("words", [["/bin/vqmoe-compare-routers"], ["-P", "-m", "vqmoe_ds.commands.compare_routers"]])
def test_a_comparison_counts_as_a_launcher_however_it_was_started(words):
    assert Process(2, 1, 1, 0, ("python", *words)).launches
    assert not Process(2, 1, 1, 0, ("python", *[word.replace("compare", "inspect") for word in words])).launches


def test_a_shipped_json_is_found_from_any_folder_unless_there_is_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_json("ds_configs/zero3.json")["zero_optimization"]["stage"] == 3
    Path("ds_configs").mkdir()
    Path("ds_configs/zero3.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert read_deepspeed_json("ds_configs/zero3.json")["zero_optimization"]["stage"] == 1


def _requirements(lines: list[str]) -> Iterator[str]:
    for line in lines:
        requirement = line.partition("#")[0].strip()
        if requirement and not requirement.startswith("-r "):
            yield requirement


def test_requirements_txt_has_the_ranges_of_the_package_and_nothing_else():
    extras = [name for names in PROJECT["optional-dependencies"].values() for name in names if "[" not in name]
    package = {*PROJECT["dependencies"], *extras}
    needed, tests = (
        set(_requirements((ROOT / f"requirements{kind}.txt").read_text("utf-8").splitlines())) for kind in ("", "-dev")
    )
    assert needed <= package
    left = package - needed - tests
    assert {re.split("[<>=]", name)[0] for name in left} == {
        *("lm-eval", "wandb", "mlflow-skinny", "sqlalchemy", "alembic")
    }, "installed by their extras alone"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a virtual environment with a wheel of the package; the libraries are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in tracked.splitlines():  # the build leaves nothing in this checkout
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(build, cwd=source, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    here = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", here))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python, wheel = str(folder / "venv/bin/python"), str(next(folder.glob("*.whl")))
    into = ["--python", python, "install", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, *into, wheel], check=True)
    return folder / "venv/bin"


def _run(installed: Path, folder: Path, *command: str) -> str:
    """Output of a command that succeeds in ``folder``, where nothing but the wheel can give it this package."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{installed}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text("some little words of a text\n" * 1000)
    return tmp_path


@pytest.mark.slow
def test_commands_of_a_wheel_in_an_empty_folder(installed, folder):
    where = "import vqmoe_ds; print(vqmoe_ds.__file__)"
    package = Path(_run(installed, folder, "python", "-c", where)).parent
    assert installed.parent in package.parents and (package / "py.typed").exists()
    assert {path.name for path in installed.glob("vqmoe-*")} == set(PROJECT["scripts"])
    _run(installed, folder, "vqmoe-pretrain", *OPTIONS, "--run_dir", "alone")
    assert json.loads((folder / "alone/summary.json").read_text())["steps"] == 2
    assert "bits/byte" in _run(installed, folder, "vqmoe-evaluate", "alone")
    assert "step 2" in _run(installed, folder, "vqmoe-inspect-checkpoint", "alone")
    assert "vqmoe-plan --preset" in _run(installed, folder, "vqmoe-plan", "--help")


@pytest.mark.slow
def test_a_comparison_by_an_installed_command(installed, folder):
    grid = {
        "ds_config": "ds_configs/zero0.json",
        "seeds": [1],
        "corpora": {"words": {"data.path": "t.txt"}},
        "set": SMALL,
    }
    (folder / "grid.yaml").write_text(json.dumps(grid | {"entries": [{"name": "codes"}]}))
    said = _run(installed, folder, "vqmoe-compare-routers", "grid.yaml", "--out", "out")
    assert "words | codes | seed 1: " in said
    assert (folder / "out/words/codes/seed-1/summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["deepspeed.launcher.runner", "--num_gpus", "2", "--module", "vqmoe_ds.commands.pretrain"],
        ["deepspeed.launcher.runner", "--num_gpus", "2", "--no_python", "vqmoe-pretrain"],
        ["torch.distributed.run", "--nproc_per_node", "2", "-m", "vqmoe_ds.commands.pretrain"],
    ],
    ids=["deepspeed-module", "deepspeed-command", "torchrun-module"],
)
def test_launchers_of_an_installed_package(launcher, installed, folder):
    options = [*OPTIONS, "--run_dir", "two", "--ep_size", "2", "--ds_config", "ds_configs/zero3.json"]
    said = _run(installed, folder, "python", "-m", *launcher, *options)
    assert "2 rank(s), EP 2, ZeRO-3" in said
    assert json.loads((folder / "two/summary.json").read_text())["steps"] == 2

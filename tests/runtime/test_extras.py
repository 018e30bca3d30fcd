"""What needs a library of an extra says so in one sentence; everything else does without it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from tests.test_commands import SMALL
from vqmoe_ds.data.image_splits import Encoded
from vqmoe_ds.data.json_tokenizer import JsonTokenizer
from vqmoe_ds.data.labelled import KNOWN_SETS, _hub_rows
from vqmoe_ds.data.recipes import _hub
from vqmoe_ds.data.spread import world
from vqmoe_ds.data.tables import _hub_data, parquet_file
from vqmoe_ds.data.tokenizers import sentencepiece
from vqmoe_ds.evaluation.plots import pyplot
from vqmoe_ds.runtime.errors import ConfigError, DataError
from vqmoe_ds.runtime.extras import EXTRAS, library


def test_what_is_there_is_imported():
    import json.decoder

    assert library("json.decoder", "Reading JSON") is json.decoder


def test_a_library_that_lacks_something_itself_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        library("half_there", "This")


@pytest.mark.parametrize(
    "read",
    [
        lambda: _hub_data.__wrapped__("hub:wikitext", False, None),
        lambda: list(_hub_rows(KNOWN_SETS["sst2"], "train", None)),
        lambda: list(_hub("wikitext")),
    ],
)
def test_the_hub_without_datasets(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import then fails as if it were not installed
    with pytest.raises(
        DataError, match=r"Hugging Face hub needs datasets, which is not installed here: pip install 'vqmoe_ds\[data\]'"
    ):
        read()


def test_prepared_data_without_megatron_core_and_training_code_without_either():
    code = """
import sys
sys.modules.update(megatron=None, datasets=None, openmpi=None, mpi4py=None)
import vqmoe_ds.train.pretrain, vqmoe_ds.checkpoint.load_model, vqmoe_ds.evaluation.generate
from vqmoe_ds.data.indexed import _pattern
from vqmoe_ds.runtime.errors import DataError
assert _pattern([1.0])[0].tolist() == [0], "one corpus needs no blending"
for read in (lambda: _pattern([0.5, 0.5]), lambda: __import__("vqmoe_ds.data.epochs")):
    try:
        read()
    except DataError as error:
        assert "needs megatron-core, which is not installed here: pip install 'vqmoe_ds[megatron]'" in str(error)
    else:
        raise AssertionError("megatron-core was not missed")
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr


def test_every_extra_that_is_named_brings_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for package, extra in EXTRAS.values():
        assert package in [re.split("[<>=]", name)[0] for name in extras[extra]]
    assert sorted(extras["all"][0].partition("[")[2].rstrip("]").split(",")) == sorted(extras.keys() - {"all"})


def _read_parquet() -> None:
    with parquet_file("nowhere.parquet"):
        pass


def _png() -> Encoded:
    return Encoded(np.zeros(1, np.int64), lambda _: "1.png", lambda _: b"")


@pytest.mark.parametrize(
    ("missing", "read", "sentence"),
    [
        (["pyarrow.parquet", "pyarrow"], _read_parquet, r"reading Parquet needs pyarrow, .*\[data\]"),
        (["sentencepiece"], lambda: sentencepiece(), r"a SentencePiece tokenizer needs sentencepiece, .*\[data\]"),
        (["google"], lambda: sentencepiece(), r"a SentencePiece tokenizer needs protobuf, .*\[data\]"),
        (["tokenizers"], lambda: JsonTokenizer("{}"), r"reading tokenizer.json needs tokenizers, .*\[data\]"),
        (["PIL.Image", "PIL"], lambda: _png().pixels(0), r"reading images needs pillow, .*\[images\]"),
        (["mpi4py"], lambda: world(2), r"preparing data on several ranks needs mpi4py, .*\[mpi\]"),
        (["matplotlib"], pyplot, r"drawing needs matplotlib, .*\[plots\]"),
        (
            ["transformers"],
            lambda: importlib.import_module("vqmoe_ds.models.hf"),
            r"model needs transformers, .*\[hf\]",
        ),
        (["lm_eval"], lambda: importlib.import_module("vqmoe_ds.evaluation.harness"), r"needs lm-eval, .*\[eval\]"),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_one_sentence_names_the_extra(missing, read, sentence, monkeypatch):
    for name in list(sys.modules):  # what is loaded already is loaded anew
        if any(f"{name}.".startswith(f"{part}.") for part in [*missing, "sentencepiece", "vqmoe_ds.models.hf"]):
            monkeypatch.delitem(sys.modules, name)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises((ConfigError, DataError), match=sentence):
        read()


def test_the_harness_without_lm_eval_ends_as_every_command():
    code = "import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_module(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, "vqmoe_ds.evaluation.harness"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].startswith("error: this command needs lm-eval, which is not installed here")


CORE_ALONE = """
import importlib.abc, runpy, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["pretrain", *{words}]
runpy.run_module("vqmoe_ds.commands.{command}", run_name="__main__")
"""


def _without_extras(command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that has no library of any extra."""
    code = (
        CORE_ALONE.replace("{names}", repr(set(EXTRAS))).replace("{words}", repr(words)).replace("{command}", command)
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)


def test_a_training_with_the_core_alone_leaves_out_pictures_and_events(tmp_path):
    (tmp_path / "t.txt").write_text("some little words of a text\n" * 1000)
    sets = [f"--set={name}={value}" for name, value in SMALL.items()]
    run_dir = tmp_path / "run"
    done = _without_extras("pretrain", "--data", str(tmp_path / "t.txt"), "--run_dir", str(run_dir), *sets)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for what, package, extra in (("pictures", "matplotlib", "plots"), ("events for", "tensorboard", "tensorboard")):
        (said,) = [line for line in lines if line.startswith(what)]
        assert f"needs {package}, which is not installed here: pip install 'vqmoe_ds[{extra}]'" in said
    assert lines[-1] == f"everything is in {run_dir} (start with summary.json)"
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 2
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) >= 1
    assert not list(run_dir.rglob("*.png")) and not (run_dir / "tensorboard").exists()
    scored = _without_extras("evaluate", str(run_dir))
    assert scored.returncode == 0 and "bits/byte" in scored.stdout
    page = _without_extras("inspect_routing", str(run_dir), "--out", str(tmp_path / "routing"))
    assert page.returncode == 2 and "error: drawing needs matplotlib" in page.stderr
    plan = _without_extras("plan", "--figure", str(tmp_path / "plan.png"))
    assert (plan.returncode, plan.stdout) == (2, "") and "error: drawing needs matplotlib" in plan.stderr

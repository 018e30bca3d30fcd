"""Data whose library is missing is refused in one sentence; everything else does without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vqmoe_ds.data.labelled import KNOWN_SETS, _hub_rows
from vqmoe_ds.data.libraries import library
from vqmoe_ds.data.recipes import _hub
from vqmoe_ds.data.tables import _hub_data
from vqmoe_ds.runtime.errors import DataError


def test_what_is_there_is_imported():
    import json.decoder

    assert library("json.decoder", "json", "Reading JSON") is json.decoder


def test_a_library_that_lacks_something_itself_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        library("half_there", "half-there", "This")


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
        DataError, match="Hugging Face hub needs datasets<6, which is not installed here: pip install 'datasets<6'"
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
        assert "needs megatron-core<0.17, which is not installed here: pip install 'megatron-core<0.17'" in str(error)
    else:
        raise AssertionError("megatron-core was not missed")
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr

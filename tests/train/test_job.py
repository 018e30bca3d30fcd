"""The start of a training command, and what is said when it fails."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from vqmoe_ds.train import job


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file or directory", "data.bin"), ZeroDivisionError()])
def test_what_goes_wrong_before_a_folder_is_made_is_told_as_it_is(monkeypatch, capsys, error):
    class Command(job.TrainingCommand):
        def prepare(self, *_: Any) -> None:
            raise error

        def run(self, job: job.Job) -> int:
            raise AssertionError

    monkeypatch.setattr(job, "hear_requests", lambda *_: None)
    assert job.launch(Command(argparse.Namespace(local_rank=None))) == 1
    said = capsys.readouterr().err
    assert said.startswith("rank 0 failed:\nTraceback") and f"{type(error).__name__}" in said and "folder" not in said

"""What an evaluation tells while it works: bars on a terminal, lines in a log, nothing on ranks above 0."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from vqmoe_ds.evaluation import passes as module
from vqmoe_ds.evaluation.passes import Passes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_log_has_a_line_of_passes_that_take_long(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    passes = Passes(log, "image", hidden=rank > 0)
    for seconds, count in ((0.5, 64), (5.0, 64)):
        now[0] += seconds
        passes("clean", 128)(count)
    tell = passes("spsa20 1/255", 2000)
    for _ in range(3):
        now[0] += 6
        tell(1000)
    lines = ["clean: 0 of 128 images", "spsa20 1/255: 2,000 of 2,000 images"]
    assert log.getvalue().splitlines() == (lines if rank == 0 else [])

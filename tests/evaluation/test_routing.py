"""Health of routing during training, on real ranks with experts shared out between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.raw_text import whole_corpus
from vqmoe_ds.evaluation.balance import busiest, gini, variation
from vqmoe_ds.evaluation.routing import RoutingHealth


def _measure(rank, world, folder):
    training = Training(folder, Layout(2, 2, 2), rank)
    probe = whole_corpus(open_corpus(str(Path(folder) / "probe.txt")), 16)
    health = RoutingHealth(training.session, probe, 64)
    health.measure()
    training.train(2)
    counts_LN = torch.stack([layer.tokens_per_expert.clone() for layer in training.session.model.moe_layers()])
    report = health.measure()
    training.close()
    return counts_LN, report, [int(layer.tokens_per_expert.sum()) for layer in training.session.model.moe_layers()]


def test_loads_of_all_ranks_are_measured_together_and_start_anew(tmp_path):
    (tmp_path / "probe.txt").write_text("0123 456 789 " * 20)
    (first_LN, report, left), (second_LN, other, _) = run_ranks(2, _measure, str(tmp_path), timeout=100)
    counts_LN = first_LN + second_LN
    assert report == other and left == [0, 0]
    for name, measure in (("busiest_expert", busiest), ("load_variation", variation), ("load_gini", gini)):
        assert report[name] == pytest.approx(measure(counts_LN).tolist(), abs=1e-4), name
    assert len(report["fluctuation"]) == len(report["code_fluctuation"]) == 2

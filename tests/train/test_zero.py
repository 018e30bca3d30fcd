"""ZeRO without its idle passes: the same weights as DeepSpeed's own methods make, and a norm that keeps its digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks
from vqmoe_ds.train import engine
from vqmoe_ds.train.zero import BLOCK, block_norms

BUCKET = 500  # elements: experts' gradients are larger, vectors' are not
CASES = [
    (stage, ep, world, precision)
    for stage in (1, 2)
    for ep, world in ((1, 1), (2, 2), (1, 2))
    for precision in ("fp32", "bf16")
]


class SmallBuckets(Layout):
    """A layout whose larger gradients do not fit a bucket, and whose clipping acts."""

    def deepspeed(self) -> dict[str, Any]:
        values = super().deepspeed()
        values["zero_optimization"]["reduce_bucket_size"] = BUCKET
        return values


def _train(rank: int, world: int, folder: str, case: tuple[Any, ...]) -> dict[str, Any]:
    answers = {}
    for name, spare in {"ours": engine.spare_passes, "theirs": lambda engine: None}.items():
        engine.spare_passes = spare
        training = Training(folder, SmallBuckets(*case), rank)
        losses = training.train(4)
        weights = [param.detach().clone() for param in training.session.model.parameters()]
        answers[name] = (losses, weights, float(training.session.engine.get_global_grad_norm()))
        sizes = [param.numel() for param in training.session.model.parameters()]
        training.close()
    assert min(sizes) < BUCKET < max(sizes)
    apart = max((a - b).abs().max().item() for a, b in zip(answers["ours"][1], answers["theirs"][1], strict=True))
    return {"losses": [a[0] for a in answers.values()], "norms": [a[2] for a in answers.values()], "apart": apart}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_are_those_of_deepspeeds_own_passes(tmp_path, case):
    for answer in run_ranks(case[2], _train, str(tmp_path), case):
        ours, theirs = answer["losses"]
        # Where gradients are clipped the last digit of the norm reaches the weights.
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        assert answer["apart"] < (1e-6 if case[3] == "fp32" else 1e-2)
        assert answer["norms"][0] == pytest.approx(answer["norms"][1], rel=1e-6)


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 3, 1_000_000])
def test_the_norm_keeps_its_digits(length: int) -> None:
    gradient = torch.randn(length)
    exact = gradient.double().norm().item()
    assert block_norms(gradient).square().sum().sqrt().item() == pytest.approx(exact, rel=1e-6)


def test_the_norm_of_what_is_not_finite_is_not_finite() -> None:
    for bad in (float("nan"), float("inf")):
        gradient = torch.ones(3 * BLOCK)
        gradient[BLOCK + 1] = bad
        assert not torch.isfinite(block_norms(gradient).square().sum())

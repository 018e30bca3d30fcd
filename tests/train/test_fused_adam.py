"""torch's fused Adam under every ZeRO stage: the engine steps with it, resumes to the bit, and no loss changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks

ALL = [Layout(stage, 2, 2, precision) for stage in range(4) for precision in ("fp32", "bf16")]
LAYOUTS = [pytest.param(layout, marks=pytest.mark.slow) if layout.stage == 1 else layout for layout in ALL]
"""Stage 1 is the code of stage 2."""


class NotFused(Layout):
    """A layout whose JSON refuses the fused optimizer."""

    def deepspeed(self) -> dict[str, Any]:
        values = super().deepspeed()
        values["optimizer"]["params"]["fused"] = False
        return values


def _train(rank: int, world: int, folder: str, fused: Layout) -> dict[str, Any]:
    layout = NotFused(fused.stage, fused.ep, fused.world, fused.precision)
    plain = Training(folder, layout, rank)
    expected = plain.train(4)
    plain.close()
    through = Training(folder, fused, rank)
    losses = through.train(2)
    path = through.save(folder)
    adam = getattr(through.session.engine.optimizer, "optimizer", through.session.engine.optimizer)
    groups = {(type(adam), bool(group["fused"])) for group in adam.param_groups}
    steps = {type(state["step"]) for state in adam.state.values()}
    losses += through.train(2)
    through.close()
    again = Training(folder, fused, rank)
    again.restore(path)
    resumed = again.train(2)
    again.close()
    other = Training(folder, layout, rank)  # without fused, from the same files
    other.restore(path)
    return {**{"expected": expected, "losses": losses, "resumed": resumed, "other": other.train(2)},
            **{"groups": groups, "steps": steps}}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_fused_optimizer_trains_saves_and_resumes_as_the_other_does(tmp_path, layout):
    report = run_ranks(2, _train, str(tmp_path), layout)[0]
    assert report["groups"] == {(torch.optim.AdamW, True)}
    assert report["steps"] == {torch.Tensor}
    assert report["resumed"] == report["losses"][2:]
    tolerance = 2e-2 if layout.precision == "bf16" else 1e-5
    assert report["losses"] == pytest.approx(report["expected"], abs=tolerance)
    assert report["other"] == pytest.approx(report["losses"][2:], abs=tolerance)

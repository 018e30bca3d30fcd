"""The learning rate of a run that goes on: what it does at the seam, and that the user is told."""

from __future__ import annotations

import pytest

from vqmoe_ds.config.schema import Extension, TrainConfig
from vqmoe_ds.train.schedule import continued, learning_rate

DONE = TrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, min_learning_rate_ratio=0.1)


def _on(extension: str, steps: int = 200) -> tuple[TrainConfig, str | None]:
    here = DONE.model_copy(update={"steps": steps, "extension": Extension(extension)})
    return continued(DONE.model_dump(mode="json"), 100, here)


def test_steps_before_an_extension_keep_the_rates_they_had() -> None:
    for extension in ("keep", "warmup"):
        config, _ = _on(extension)
        assert [learning_rate(s, config) for s in range(100)] == [learning_rate(s, DONE) for s in range(100)]


def test_keep_holds_the_rate_of_the_end() -> None:
    config, sentence = _on("keep")
    assert {learning_rate(s, config) for s in range(100, 200)} == {learning_rate(99, DONE)}
    assert sentence == "the finished run of 100 steps goes on to 200: its learning rate stays 0.1"


def test_warmup_rises_from_the_end_to_the_peak_and_falls_over_the_new_steps() -> None:
    config, sentence = _on("warmup")
    rates = [learning_rate(s, config) for s in range(99, 200)]
    assert rates[0] < rates[1] < rates[5] < rates[10] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert sentence is not None and "rises again from 0.1" in sentence


def test_planned_anew_the_jump_is_named() -> None:
    config, sentence = _on("replan")
    assert learning_rate(100, config) == learning_rate(100, DONE.model_copy(update={"steps": 200}))
    assert sentence is not None and f"goes from 0.1 to {learning_rate(100, config):.3g}" in sentence


def test_an_extended_run_that_is_resumed_again_goes_on_with_its_schedule_in_silence() -> None:
    config, _ = _on("warmup")
    again, sentence = continued(config.model_dump(mode="json"), 150, config.model_copy(update={"extended_from": 0}))
    assert (again, sentence) == (config, None)


def test_extended_twice_it_keeps_the_same_rate() -> None:
    config, _ = _on("keep")
    longer, _ = continued(config.model_dump(mode="json"), 200, config.model_copy(update={"steps": 300}))
    assert learning_rate(250, longer) == pytest.approx(learning_rate(150, config), rel=5e-3)


def test_a_change_in_the_middle_names_the_field_and_both_rates() -> None:
    config, sentence = continued(DONE.model_dump(mode="json"), 50, DONE.model_copy(update={"learning_rate": 0.5}))
    old, new = learning_rate(50, DONE), learning_rate(50, config)
    assert sentence == (
        f"the learning rate of step 51 is {new:.3g} instead of {old:.3g}, for train.learning_rate changed"
    )


def test_a_resume_that_changes_nothing_says_nothing() -> None:
    assert continued(DONE.model_dump(mode="json"), 50, DONE) == (DONE, None)
    assert continued(DONE.model_dump(mode="json"), 100, DONE) == (DONE, None)

"""The learning rate of a run that goes on: what it does at the seam, and that the user is told."""

from __future__ import annotations

import pytest

from vqmoe_ds.config.schema import Extension, TrainConfig
from vqmoe_ds.train.schedule import continued, learning_rate, misfits

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


def test_a_run_that_is_extended_again_and_again_keeps_the_rate_it_ended_with() -> None:
    config, _ = _on("warmup", 105)  # which ends before its peak: no schedule of 105 steps ends so
    end = learning_rate(104, config)
    config, sentence = continued(
        config.model_dump(mode="json"), 105, config.model_copy(update={"steps": 110, "extension": Extension.KEEP})
    )
    assert learning_rate(105, config) == learning_rate(109, config) == end
    assert sentence is not None and sentence.endswith(f"stays {end:.3g}")
    lower = config.model_copy(update={"steps": 120, "learning_rate": 0.5})
    lower, sentence = continued(config.model_dump(mode="json"), 110, lower)
    assert learning_rate(115, lower) == end and sentence is not None and sentence.endswith(f"stays {end:.3g}")
    longer = {"steps": 150, "extension": Extension.WARMUP, "learning_rate": 1.0}
    risen, _ = continued(lower.model_dump(mode="json"), 120, lower.model_copy(update=longer))
    rates = [learning_rate(step, risen) for step in range(120, 150)]
    assert rates[0] == pytest.approx(end + (1 - end) / 10) and max(rates) == 1.0
    again, sentence = continued(risen.model_dump(mode="json"), 130, risen.model_copy(update={"extended_rate": 0.0}))
    assert (again, sentence) == (risen, None)


@pytest.mark.parametrize(
    ("changes", "scheduler", "said"),
    [
        ({}, None, []),
        ({"steps": 10}, None, ["train.steps=10 end within the warm-up of train.warmup_steps=10: "]),
        ({"steps": 105, "extended_from": 100, "extension": Extension.WARMUP}, None, ["the 5 new steps end within "]),
        ({"steps": 105, "extended_from": 100, "extension": Extension.KEEP}, None, []),
        (
            {},
            {"type": "WarmupDecayLR", "params": {"total_num_steps": 50, "warmup_num_steps": 5}},
            [
                "the learning rate is that of WarmupDecayLR of the DeepSpeed JSON; train.learning_rate, ",
                "WarmupDecayLR ends at total_num_steps=50 of train.steps=100: it stays at its lowest rate",
            ],
        ),
        (
            {},
            {"type": "WarmupLR", "params": {}},
            [
                "the learning rate is that of WarmupLR of the DeepSpeed JSON; train.warmup_steps, ",
                "train.steps=100 end within warmup_num_steps=1000 of WarmupLR: ",
            ],
        ),
        ({}, {"type": "StepLR", "params": {"step_size": 3}}, ["the learning rate is that of StepLR "]),
        ({}, {"type": "OneCycle", "params": {"cycle_first_step_size": "3"}}, ["the learning rate is that of "]),
    ],
)
def test_a_schedule_that_the_steps_do_not_fit_is_named(changes, scheduler, said) -> None:
    found = misfits(DONE.model_copy(update=changes), scheduler)
    assert len(found) == len(said)
    assert all(sentence.startswith(start) for sentence, start in zip(found, said, strict=True))

"""What DeepSpeed finds late becomes one sentence; a defect of ours keeps its traceback."""

import pytest

from vqmoe_ds.config.refusals import check_by_deepspeed, refusals
from vqmoe_ds.runtime.errors import ConfigError

GOOD = {"train_batch_size": 1}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "(AssertionError)"),
        ({"zero_optimization": {"foo": 1}}, "foo=1: extra inputs are not permitted (DeepSpeedZeroConfig)"),
        ({"communication_data_type": "x"}, "Invalid communication_data_type"),
        ({"sparse_gradients": True}, "(DeepSpeedConfigError)"),
        ({"timers": {"throughput": 5}}, "(TypeError)"),
        ({"log_level": 5}, None),
    ],
)
def test_deepspeeds_own_reading(values, sentence):
    if sentence is None:
        check_by_deepspeed({**GOOD, **values}, "ds.json")
        return
    with pytest.raises(ConfigError) as caught:
        check_by_deepspeed({**GOOD, **values}, "ds.json")
    assert str(caught.value).startswith("DeepSpeed config ds.json: ")
    assert sentence in str(caught.value)


def test_a_runtime_error_of_deepspeeds_is_a_sentence_too(monkeypatch):
    from deepspeed.runtime import config

    raises = compile("def read(values): raise RuntimeError('no such thing')", config.__file__, "exec")
    exec(raises, place := {})
    monkeypatch.setattr(config, "DeepSpeedConfig", place["read"])
    with pytest.raises(ConfigError, match=r"DeepSpeed cannot work with it \(RuntimeError\): no such thing"):
        check_by_deepspeed(GOOD, "ds.json")


def test_packages_that_are_missing_are_named():
    with pytest.raises(ConfigError, match="needs the Python package no_such_package"), refusals("ds.json"):
        import no_such_package  # noqa: F401


def test_an_optimizer_that_refuses_its_options():
    import torch

    with pytest.raises(ConfigError, match=r"\(TypeError\).*unexpected keyword argument 'betas'"), refusals("ds.json"):
        torch.optim.SGD([torch.zeros(1)], betas=(0, 0))
    with pytest.raises(ConfigError, match=r"\(RuntimeError\).*`fused` and `foreach`"), refusals("ds.json"):
        torch.optim.SGD([torch.zeros(1)], fused=True, foreach=True)


def test_a_defect_of_this_package_keeps_its_traceback():
    from vqmoe_ds.runtime.errors import one_line

    with pytest.raises(TypeError), refusals("ds.json"):
        one_line(5)
    with pytest.raises(MemoryError), refusals("ds.json"):
        raise MemoryError

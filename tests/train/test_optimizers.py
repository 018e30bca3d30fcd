"""Every ``optimizer.type``: it trains alike at every ZeRO stage, experts included, and resumes to the bit."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from tests.checkpoint.layouts import Layout, Training
from tests.distributed import run_ranks
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.resume.session import check_fits, load
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.deepspeed_values import ADAMS, OPTIMIZERS
from vqmoe_ds.config.load import load_config
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError

ON_GPUS = ("Lamb", "Lion")
OTHERS = [name for name in OPTIMIZERS.values() if name.lower() not in ADAMS and name not in ON_GPUS]
PARAMS: dict[str, dict[str, Any]] = {
    "Muon": {"momentum": 0.9, "muon_lr": 0.02, "torch_adam": True},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9},
}


class With(Layout):
    """A layout with another optimizer, of class attributes since all ranks make their own."""

    kind = ""

    def deepspeed(self) -> dict[str, Any]:
        values = super().deepspeed()
        values["optimizer"] = {"type": self.kind.lower(), "params": dict(PARAMS.get(self.kind, {}))}
        return values


def _train(rank: int, world: int, folder: str, layout: Layout, kinds: list[str]) -> dict[str, Any]:
    torch._dynamo.config.disable = True  # tests import Muon before a run would
    found = {}
    for kind in kinds:
        With.kind = kind
        place = Path(folder) / kind
        place.mkdir(exist_ok=True)
        through = Training(str(place), layout, rank)
        losses = through.train(2)
        tag = through.save(place)
        read = _as_it_was_saved(through.session, open_checkpoint(tag), layout)
        losses += through.train(2)
        through.close()
        again = Training(str(place), layout, rank)
        again.step = load(again.session, tag)
        resumed = again.train(2)
        experts = [
            param.detach().clone() for name, param in again.session.model.named_parameters() if "experts" in name
        ]
        again.close()
        with pytest.raises(CheckpointError, match=f"optimizer {kind} resumes on the layout it was written with only"):
            check_fits(_other_layout(again.session.config), tag)
        found[kind] = losses, resumed, read and all(param.isfinite().all() for param in experts)
    return found


def _as_it_was_saved(session: Any, reader: Any, layout: Layout) -> bool:
    """Whether the tools read the weights that were saved, and none of Adam's moments where there are none."""
    params, rank = dict(session.model.named_parameters()), session.config.ep_rank(session.place.rank)
    gathered = deepspeed.zero.GatheredParameters(list(params.values())) if layout.stage == 3 else nullcontext()
    with gathered:
        for name, param in params.items():
            first = rank * len(param) if ".experts." in name else 0
            if not torch.equal(reader.tensor(name)[first : first + len(param)], param.detach()):
                return False
    return bool(reader.has_optimizer == (session.config.deepspeed["optimizer"]["type"] in ("NAdam", "RAdam")))


def _other_layout(config: Any) -> Any:
    from dataclasses import replace

    return replace(config, ep_size=3 - config.ep_size)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, list[float]]:
    """Losses on one rank without ZeRO, of Muon at ZeRO 1 as well: from there on DeepSpeed clips its updates, not the
    gradients that they are made from."""
    folder = str(tmp_path_factory.mktemp("one"))
    plain = run_ranks(1, _train, folder, With(0, 1, 1), OTHERS)[0]
    flat = run_ranks(1, _train, folder, With(1, 1, 1), ["Muon"])[0]
    return {kind: found[0] for kind, found in {**plain, "Muon at ZeRO": flat["Muon"]}.items()}


@pytest.mark.parametrize(
    "layout",
    [With(0, 2, 2), With(1, 1, 2), pytest.param(With(2, 2, 2), marks=pytest.mark.slow), With(3, 2, 2)],
    ids=str,
)
def test_all_stages_train_alike_and_resume_to_the_bit(layout, expected, tmp_path):
    kinds = [kind for kind in OTHERS if kind != "Adagrad" or not layout.stage]
    found = run_ranks(2, _train, str(tmp_path), layout, kinds, timeout=280)[0]
    assert {kind for kind, (losses, resumed, _) in found.items() if losses[2:] != resumed} == set()
    assert all(finite for _, _, finite in found.values())
    for kind, (losses, *_) in found.items():
        same = "Muon at ZeRO" if kind == "Muon" and layout.stage else kind
        assert losses == pytest.approx(expected[same], abs=1e-4), kind


def _resolve(folder: Path, gpu: bool = False, **optimizer: Any) -> dict[str, Any]:
    (folder / "ds.json").write_text(json.dumps({"optimizer": optimizer}))
    return resolve(str(folder / "ds.json"), load_config(), 1, gpu=gpu).deepspeed


def test_types_are_known_in_any_letters_and_get_the_options_they_take(tmp_path):
    sgd = _resolve(tmp_path, type="sgd")
    assert sgd["optimizer"]["type"] == "SGD" and sgd["optimizer"]["params"].keys() == {"lr", "weight_decay"}
    assert sgd["zero_allow_untested_optimizer"] is True
    assert _resolve(tmp_path, type="nadam")["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert "zero_allow_untested_optimizer" not in _resolve(tmp_path, type="adamw")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("MuAdamW", "scales by the base shapes of muP"),
        ("LBFGS", "evaluates the loss several times a step"),
        ("SparseAdam", "takes sparse gradients alone"),
        ("OneBitAdam", "is not in DeepSpeed 0.19.8 any more; take one of Adam, "),
        ("Lamb", "is a kernel for GPUs in DeepSpeed; on a CPU take another"),
        ("lion", "on the host with zero_optimization.offload_optimizer"),
    ],
)
def test_what_cannot_train_is_refused_with_the_reason(kind, why, tmp_path):
    with pytest.raises(ConfigError, match=f"ds.json: optimizer {kind}.*{why}" if kind != "lion" else why):
        _resolve(tmp_path, type=kind)


def test_a_type_that_nobody_has_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"ds.json: optimizer.type adamw_torch is neither .*; take one of Adam, Ada"):
        _resolve(tmp_path, type="adamw_torch")
    for kind in ("Adafactor", "Adadelta", "ASGD"):  # PyTorch's, and none takes betas
        values = _resolve(tmp_path, type=kind)["optimizer"]
        getattr(torch.optim, values["type"])([torch.nn.Parameter(torch.ones(2))], **values["params"])


def test_adagrad_is_refused_where_deepspeed_merges_its_groups(tmp_path):
    (tmp_path / "ds.json").write_text('{"optimizer": {"type": "Adagrad"}, "zero_optimization": {"stage": 2}}')
    with pytest.raises(ConfigError, match="ds.json: DeepSpeed makes one group of all parameters for Adagrad"):
        resolve(str(tmp_path / "ds.json"), load_config(), 1)


def test_muon_in_16_bits_needs_zero(tmp_path):
    for stage, fits in ((0, False), (1, True)):
        values = {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
        (tmp_path / "ds.json").write_text(json.dumps(values))
        with nullcontext() if fits else pytest.raises(ConfigError, match="Muon in 16 bits needs ZeRO 1 to 3"):
            resolve(str(tmp_path / "ds.json"), load_config(), 1)


def test_kernels_of_gpus_run_on_gpus(tmp_path):
    for kind in ON_GPUS:
        assert _resolve(tmp_path, gpu=True, type=kind)["optimizer"]["type"] == kind

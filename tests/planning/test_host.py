"""A model that the CPUs' memory cannot hold is refused before any of it is built."""

import resource
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config, preset_names
from vqmoe_ds.config.routers import routers
from vqmoe_ds.planning import fit, host
from vqmoe_ds.planning.parameters import count, least_bytes
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.ranks import Place
from vqmoe_ds.train.job import check_start

ZERO = str(Path(__file__).resolve().parents[2] / "ds_configs/zero0.json")

NARROW = {"model.width": 8, "model.heads": 1, "moe.expert_hidden": 8, "moe.num_experts": 2}


def check(ranks: int = 1, **fields) -> None:
    overrides = {name.replace("__", "."): value for name, value in fields.items()}
    config = resolve(ZERO, load_config("tiny", None, overrides), ranks, gpu=False)
    host.check_host_memory(config, Place(0, ranks, 0, ranks))


def test_what_fits_is_let_through():
    for router in ("vq", "stablemoe", "smoe_dropout", "dense"):
        check(moe__router=router)


@pytest.mark.parametrize(
    "fields",
    [
        {"model__layers": 1024, "model__width": 8192},
        {"model__width": 2**20},
        {"model__vocab_size": 2**31},
        {"model__sequence_length": 2**24},
        {"moe__num_experts": 2**14, "model__layers": 8, "moe__expert_hidden": 2**16},
        {"moe__router": "hash_token", "model__vocab_size": 2**31 - 1},
    ],
)
def test_what_does_not_is_refused_quickly_and_in_little_memory(fields):
    check()  # libraries are loaded
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"needs at least [0-9,.]+ GiB .*, and this machine has [0-9.]+ GiB; reduce"):
        check(**fields)
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "KiB"


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_refused_in_one_sentence_where_it_does_not_fit(preset, monkeypatch):
    monkeypatch.setattr(host, "total_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match="this rank needs at least"):
        host.check_host_memory(resolve(ZERO, load_config(preset), 1, gpu=False), Place(0, 1, 0, 1))


def test_a_router_may_refuse_shallow_models(monkeypatch):
    def check(run):
        if run.model.layers < 13:
            raise ValueError("too shallow")

    run = load_config("tiny", None, {"moe.router": "topk", "model.layers": 13}).config
    monkeypatch.setattr(run.moe.facts, "check", check)
    assert least_bytes(run) > 0


def test_ranks_of_one_machine_count_together(monkeypatch):
    monkeypatch.setattr(host, "total_bytes", lambda: 2**30)
    check(1)
    with pytest.raises(ConfigError, match="the 16 ranks of this machine need"):
        check(16)


def test_a_machine_that_is_too_small_is_told_to_the_others(monkeypatch):
    monkeypatch.setattr(host, "total_bytes", lambda: 2**20)
    job = SimpleNamespace(config=resolve(ZERO, load_config("tiny", None, {}), 2, gpu=False), place=Place(1, 2, 0, 1))
    with pytest.raises(ConfigError, match="this rank needs at least"):
        check_start(job, None, torch.device("cpu"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model.moe_every": 2},
        {"model.moe_every": 3},
        {"model.dense_layers": 2},
        {"model.moe_every": 2, "model.dense_layers": 3},
        {"moe.router": "adaptive_clustering", "router.plain_layers": 2},
        {"moe.router": "adaptive_clustering", "router.plain_layers": 4, "model.moe_every": 2},
    ],
)
def test_the_quick_count_is_that_of_the_model_or_a_little_less(fields):
    run = load_config("tiny", None, {"model.layers": 13, **fields}).config
    whole = 4 * count(run).stored + count(run).buffer_bytes
    assert 0.9 * whole <= least_bytes(run) <= whole


@pytest.mark.parametrize("router", list(routers()))
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "model.width": 32,
            "model.heads": 2,
            "moe.expert_hidden": 32,
            "moe.num_experts": 64,
            "codebook.num_codes": 512,
        },
        {"model.vocab_size": 60000, "model.width": 16, "model.heads": 2},
        {"model.sequence_length": 2048, "model.layers": 2},
        {"model.layers": 12, "moe.num_experts": 2, "moe.top_k": 2},
        {**NARROW, "model.dense_hidden": 2**16, "model.moe_every": 2},
        {**NARROW, "moe.shared_experts": 512, "moe.expert_hidden": 512},
        {**NARROW, "moe.num_experts": 4096, "model.sequence_length": 4096, "data.separate_documents": True},
    ],
)
def test_the_bound_that_needs_no_count_is_above_it(router, fields):
    loaded = load_config("tiny", None, {"moe.router": router, **fields})
    for zero in ("zero0", "zero2", "zero3"):
        config = resolve(ZERO.replace("zero0", zero), loaded, 1, gpu=False)
        assert host._at_most(config) > fit.least_bytes(config, 0)


@pytest.mark.parametrize("slots", [0, 1, 100, 4096])
def test_the_bound_counts_slots(slots):
    loaded = load_config("vit-cifar", None, {"moe.router": "softmoe", "router.slots": slots})
    config = resolve(ZERO, loaded, 1, gpu=False)
    assert host._at_most(config) > fit.least_bytes(config, 0)

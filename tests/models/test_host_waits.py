"""A training step reads no tensor on the host: on a GPU the host would wait there for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host_reads import host_reads
from vqmoe_ds.config.routers import routers
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.state_sync import StateSync

LENGTH, BATCH = 8, 3
CASES: dict[str, dict[str, Any]] = {router: {"moe": {"router": router}} for router in routers()}
CASES["vq, discrete only"] = {"moe": {"router": "vq", "top_k": 0}}
CASES["vq, top-2"] = {"moe": {"router": "vq", "top_k": 2}}
for source in ("layer_state", "token_embedding", "position_embedding", "early_block"):
    CASES[f"vq, {source}"] = {"codebook": {"source": source}}
CASES["vq, layer state with all options"] = {
    "moe": {"code_blend": 0.5},
    "codebook": {
        "source": "layer_state",
        "normalize_source": False,
        "commitment_weight": 0.1,
        "soft_output": 1.0,
        "learning": "gradient",
    },
}
CASES["vq, momentum source"] = {"codebook": {"source_momentum": 0.9}}
CASES["vq, small codes"] = {"codebook": {"code_dim": 4, "distance": "cosine", "code_map": "balanced"}}
CASES["adaptive clustering, of the batch"] = {
    "moe": {"router": "adaptive_clustering"},
    "router": {"statistics": "batch"},
}


def _config(case: str, recompute: bool) -> RunConfig:
    changes = CASES[case]
    moe = {"num_experts": 4, "expert_hidden": 16, "z_loss_weight": 0.01, **changes.get("moe", {})}
    model = {"layers": 3, "width": 16, "heads": 2, "sequence_length": LENGTH, "vocab_size": 32}
    train = {"activation_checkpointing": recompute, "steps": 20}
    return RunConfig.model_validate({**changes, "model": model, "moe": moe, "train": train})


def _tokens() -> Tensor:
    return torch.randint(0, 32, (BATCH, LENGTH + 1))


def _run(model: MoETransformer) -> None:
    tokens_BS = _tokens()
    loss, aux = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    (loss + aux).backward()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_a_micro_batch_reads_nothing(case: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MoETransformer(_config(case, recompute))
    sync = StateSync(model)
    for _ in range(2):  # codes are initialized, tables filled; counters are known to the host
        _run(model)
        sync.step()
    if model.source is not None and model.source.follows:
        model.source.follow(model.embed.weight)
    _run(model)
    with host_reads(monkeypatch) as reads:
        _run(model)
    # The CPU looks codes of tokens up once for each token.
    allowed = "_unique2" if case in ("vq, token_embedding", "vq, early_block") else "nothing"
    assert [place for place in reads.places if allowed not in place] == []


WITHOUT_STATE = (
    *("dense", "topk", "topk_context", "xmoe", "hash_token", "hash_context", "token_table", "expert_choice"),
)


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_STATE])
def test_an_optimizer_step_reads_at_most_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MoETransformer(_config(case, False))
    sync = StateSync(model)
    for _ in range(3):
        _run(model)
        sync.step()
    _run(model)
    with host_reads(monkeypatch) as reads:
        sync.step()
        if model.source is not None and model.source.follows:
            model.source.follow(model.embed.weight)
    assert len(reads.places) <= 1, reads.places


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: bool(t.any()),
        lambda t: int(t[0]),
        lambda t: t.nonzero(),
        lambda t: torch.bincount(t),
        lambda t: t.unique(),
        lambda t: t[t > 0],
        lambda t: t.cpu(),
    ],
    ids=["item", "tolist", "bool", "int", "nonzero", "bincount", "unique", "mask", "cpu"],
)
@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_the_counter_sees(read: Any, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if inside == "forward":
                read(torch.arange(3))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            if inside == "backward":
                read(torch.arange(3))
            return grads[0]

    monkeypatch.setattr("tests.host_reads.PACKAGE", Path(__file__).resolve().parent)
    x = torch.ones(2, requires_grad=True)
    with host_reads(monkeypatch) as reads:
        Reading.apply(x).sum().backward()
    assert len(reads.places) >= 1

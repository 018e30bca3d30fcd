"""At one seed, models that differ in their router are equal in everything else, and see the same data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.prepared import write_texts
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.indexed import open_indexed_text
from vqmoe_ds.data.raw_text import open_raw_text
from vqmoe_ds.models.transformer import MoETransformer

ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 2},
    "vq": {"top_k": 1},
    "expert_bias": {"top_k": 2},
    "xmoe": {"top_k": 2},
    "stablemoe": {"top_k": 2},
    "smoe_dropout": {"top_k": 1},
    "random_frozen": {"top_k": 2},
    "hash_token": {"top_k": 0},
    "hash_context": {"top_k": 1},
    "topk_context": {"top_k": 2},
    "topk_frozen": {"top_k": 2},
    "online_kmeans": {"top_k": 2},
    "expert_choice": {"top_k": 2},
    "adaptive_clustering": {"top_k": 2},
}


def _config(router: str, seed: int = 3, data: dict[str, Any] | None = None) -> RunConfig:
    shape = {"vocab_size": 257, "layers": 4, "width": 24, "heads": 2, "sequence_length": 16}
    experts = {"router": router, "num_experts": 4, "expert_hidden": 12, **ROUTERS.get(router, {})}
    return RunConfig(
        model=shape | {"moe_every": 2, "dense_hidden": 20}, moe=experts, train={"seed": seed}, data=data or {}
    )


def _model(router: str, seed: int = 3) -> MoETransformer:
    return MoETransformer(_config(router, seed))


def _outside_routers(model: MoETransformer) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if ".router." not in name}


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_outside_the_router_are_those_of_every_other_router(router):
    ours, theirs = _outside_routers(_model(router)), _outside_routers(_model("topk"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_dense_model_shares_all_that_is_not_an_expert():
    dense, sparse = _outside_routers(_model("dense")), _outside_routers(_model("topk"))
    shared = {name for name in dense if ".mlp." not in name or name.startswith(("blocks.0", "blocks.2"))}
    assert {"embed.weight", "head.weight", "blocks.3.attention.qkv.weight", "blocks.2.mlp.up.weight"} <= shared
    assert all(torch.equal(dense[name], sparse[name]) for name in shared)


def test_routers_with_a_linear_gate_share_it_and_each_layer_has_its_own():
    gates = [
        _model("topk").moe_layers()[1].router.gate.weight,
        _model("expert_bias").moe_layers()[1].router.gate.weight,
    ]
    gates += [_model("vq").moe_layers()[1].router.continuous.gate.weight]
    gates += [_model("random_frozen").moe_layers()[1].router.gate_ND]
    assert all(torch.equal(gate, gates[0]) for gate in gates)
    assert not torch.equal(gates[0], _model("topk").moe_layers()[0].router.gate.weight)


def test_seeds_differ_and_every_matrix_has_the_size_it_should():
    one, two = _model("vq", seed=1), _model("vq", seed=2)
    pairs = list(zip(one.named_parameters(), two.parameters(), strict=True))
    assert all(not torch.equal(a, b) for (_, a), b in pairs if a.ndim > 1)
    sizes = {name: float(weight.detach().std()) for name, weight in one.named_parameters()}
    assert sizes["embed.weight"] == pytest.approx(1, rel=0.1)
    assert sizes["blocks.1.attention.qkv.weight"] == pytest.approx(24**-0.5, rel=0.1)
    assert sizes["blocks.1.attention.out.weight"] == pytest.approx(24**-0.5 / 8**0.5, rel=0.1)
    assert sizes["head.weight"] == pytest.approx(0.5 * 24**-0.5, rel=0.1)


@pytest.mark.parametrize("prepared", [False, True], ids=["raw text", "prepared"])
def test_batches_and_their_order_are_those_of_every_other_router(tmp_path, prepared):
    texts = [f"{i} little words make {i * i % 97} long stories. " * 8 for i in range(60)]
    (tmp_path / "text").write_text("".join(texts))
    path = write_texts(tmp_path / "prepared", texts) if prepared else str(tmp_path / "text")
    seen = []
    for router in ("topk", "vq", "stablemoe"):
        config = _config(router, data={"path": path})
        data = open_indexed_text(config) or open_raw_text(config)
        (tmp_path / router).mkdir()
        batches, windows = data.open(config, tmp_path / router)
        seen.append([b.inputs_BS for first in (0, 16) for b in batches.micro_batches(first, 0, 1, 16)])
        seen[-1].append(windows.read(np.arange(4)).inputs_BS)
    for others in seen[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(seen[0], others, strict=True))

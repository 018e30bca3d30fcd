"""Shared experts: one SwiGLU MLP for every token, added to what the router's experts give, whichever router."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.moe.test_router_parity import CASES
from vqmoe_ds.checkpoint.figures import sizes
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer
from vqmoe_ds.planning.parameters import count

ROUTERS = CASES | {"codes": ({"router": "vq", "top_k": 0}, {}), "codes and top-1": ({"router": "vq"}, {})}


def _layer(case: str, shared: int, layer: int = 0, gate: bool = False) -> MoELayer:
    moe, options = ROUTERS[case]
    config = MoEConfig(**{"num_experts": 8, "expert_hidden": 12, **moe, "shared_experts": shared, "shared_gate": gate})
    return MoELayer(LayerConfig(16, config, options, layer=layer, seed=3, vocab_size=30, out_scale=0.5)).eval()


@pytest.mark.parametrize("case", ROUTERS)
def test_they_are_added_whatever_routes(case: str) -> None:
    from vqmoe_ds.moe.routers import RoutingContext

    x_BSD = torch.randn(2, 6, 16)
    layer, known_T = _layer(case, 2), torch.arange(12)
    rows = layer.config.moe.facts.told_rows
    told = known_T % 8 if rows == 1 else known_T.view(-1, 1).expand(-1, rows) % 8
    context = RoutingContext(token_ids_T=known_T, expert_ids_T=told, source_TD=torch.randn(12, 16))
    context = context if ROUTERS[case][0]["router"] not in ("vq", "topk") else None
    alone, _, ids = _layer(case, 0)(x_BSD, context)
    both, _, same_ids = layer(x_BSD, context)
    shared = layer.shared
    want = F.linear(F.silu(x_BSD @ shared.gate.weight.t()) * (x_BSD @ shared.up.weight.t()), shared.down.weight)
    assert shared.gate.weight.shape == (24, 16) and want.abs().mean() > 0.01
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(both - alone, want, rtol=1e-5, atol=1e-6)


def test_a_gate_weights_them_by_the_state_of_each_token() -> None:
    x_BSD = torch.randn(2, 6, 16)
    alone, even, gated = (_layer("codes", *options)(x_BSD)[0] for options in ((0,), (2,), (2, 0, True)))
    weights = (x_BSD @ _layer("codes", 2, gate=True).shared.scale.weight.t()).sigmoid()
    assert weights.std() > 0.05
    torch.testing.assert_close(gated - alone, (even - alone) * weights, rtol=1e-5, atol=1e-6)


def test_they_follow_from_the_seed_and_the_layer() -> None:
    torch.manual_seed(1)
    first = _layer("codes", 2)
    torch.manual_seed(2)
    again, other = _layer("codes", 2), _layer("codes", 2, layer=1)
    for name, weight in first.shared.named_parameters():
        assert torch.equal(weight, again.shared.get_parameter(name)), name
        assert not torch.equal(weight, other.shared.get_parameter(name)), name
        assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5 * (0.5 if "down" in name else 1), rel=0.2)


def test_a_dense_model_of_the_same_shape_is_as_wide() -> None:
    moe = {"num_experts": 4, "expert_hidden": 12, "top_k": 2, "shared_experts": 3}
    model = {"vocab_size": 50, "layers": 2, "width": 24, "heads": 2, "sequence_length": 16}
    sparse, dense = (RunConfig(model=model, moe={**moe, "router": router}) for router in ("topk", "dense"))
    assert MoETransformer(dense).blocks[0].mlp.gate.weight.shape == ((2 + 3) * 12, 24)
    routers = 2 * 24 * 4
    active = {
        run.moe.router: sizes({w.name: w.shape for w in count(run).weights}, run)["active"] for run in (sparse, dense)
    }
    assert active["topk"] - routers == active["dense"]


def test_a_gate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="moe.shared_gate=true weights shared experts, and moe.shared_experts=0"):
        MoEConfig(shared_gate=True)


def test_more_than_a_matrix_holds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"moe.shared_experts=16000 x moe.expert_hidden=60000 is more than"):
        MoEConfig(shared_experts=16_000, expert_hidden=60_000)

"""What a layer does whichever router it has: a norm after every expert, and shared experts for every token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.moe.test_router_parity import CASES
from vqmoe_ds.checkpoint.figures import sizes
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, RoutingContext
from vqmoe_ds.planning.parameters import count

ROUTERS = CASES | {"codes": ({"router": "vq", "top_k": 0}, {}), "codes and top-1": ({"router": "vq"}, {})}


def _layer(case: str, shared: int, layer: int = 0, gate: bool = False, norm: bool = False) -> MoELayer:
    moe, options = ROUTERS[case]
    more = {"shared_experts": shared, "shared_gate": gate, "output_norm": norm}
    config = MoEConfig(**{"num_experts": 8, "expert_hidden": 12, **moe, **more})
    return MoELayer(LayerConfig(16, config, options, layer=layer, seed=3, vocab_size=30, out_scale=0.5)).eval()


def _context(case: str) -> RoutingContext | None:
    known_T, (moe, options) = torch.arange(12), ROUTERS[case]
    if moe["router"] in ("vq", "topk"):
        return None
    config = LayerConfig(16, MoEConfig(**moe), options)
    rows = config.moe.facts.told_rows(config.options)
    told_TR = known_T.view(-1, 1).expand(-1, rows) % 8
    return RoutingContext(token_ids_T=known_T, expert_ids_TR=told_TR, source_TD=torch.randn(12, 16))


@pytest.mark.parametrize("case", ROUTERS)
def test_a_norm_follows_every_expert_whatever_routes(case: str) -> None:
    """By hand: each row through its expert alone, the norm, the sum by weights."""
    x_BSD, context = torch.randn(2, 6, 16), _context(case)
    layer = _layer(case, 0, norm=True)
    x_TD, want_TD = x_BSD.view(12, 16), torch.zeros(12, 16)
    routing = layer.router(x_TD, replace(context or RoutingContext(), sequence=6))
    ids_MR, inputs, slots = routing.expert_ids_TR, x_TD, routing.slots
    if slots is not None:
        inputs, want_TD = slots.inputs_MD, torch.zeros_like(slots.inputs_MD)
    elif routing.tokens_M is not None:
        inputs = x_TD[routing.tokens_M]
    dual = layer.config.moe.router in ("vq", "hash_context")
    for m, row_D in enumerate(inputs):
        for r, expert in enumerate(ids_MR[m].tolist()):
            y_D = layer.experts(row_D.view(1, -1), (torch.arange(8) >= expert).long())[0]
            if not dual or r == ids_MR.shape[1] - 1:
                y_D = (y_D - y_D.mean()) / (y_D.var(unbiased=False) + 1e-5).sqrt()
            weight = 1.0 if routing.weights_TR is None else routing.weights_TR[m, r]
            want_TD[m if routing.tokens_M is None else routing.tokens_M[m]] += weight * y_D
    if slots is not None:
        want_TD = slots.gather(want_TD)
    torch.testing.assert_close(layer(x_BSD, context)[0].view(12, 16), want_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ROUTERS)
def test_they_are_added_whatever_routes(case: str) -> None:
    x_BSD = torch.randn(2, 6, 16)
    layer, context = _layer(case, 2), _context(case)
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

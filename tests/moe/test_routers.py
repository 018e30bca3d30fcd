"""Routers: weights, losses, and what each refuses. Gradients are checked in test_layer_oracle.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig, RunConfig
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.routers.hash_token import hash_of_tokens
from vqmoe_ds.moe.routers.topk import TopKRouter
from vqmoe_ds.moe.routers.vq import VQRouter
from vqmoe_ds.runtime.errors import ConfigError

WIDTH, EXPERTS = 16, 6


def _topk(**options: object) -> TopKRouter:
    return TopKRouter(LayerConfig(WIDTH, MoEConfig(router="topk", num_experts=EXPERTS, **options)))


def _vq(moe: MoEConfig, book: CodebookConfig) -> tuple[VQRouter, CodebookBank]:
    config = LayerConfig(WIDTH, moe, codebook=book, shared_codebook=True)
    return VQRouter(config), CodebookBank(book, 1, EXPERTS, WIDTH, 0)


def test_top1_weight_is_the_probability_and_more_are_normalised() -> None:
    x_TD = torch.randn(30, WIDTH)
    one, three = _topk(top_k=1), _topk(top_k=3)
    routing = one(x_TD)
    probs_TN = one.gate(x_TD).softmax(-1)
    assert torch.equal(routing.expert_ids_TR[:, 0], probs_TN.argmax(-1))
    assert torch.allclose(routing.weights_TR, probs_TN.amax(-1, keepdim=True))
    routing = three(x_TD)
    assert torch.allclose(routing.weights_TR.sum(-1), torch.ones(30))
    assert (routing.expert_ids_TR.sort(dim=1).values.diff(dim=1) > 0).all(), "the same expert twice"
    logits_TN = three.gate(x_TD)
    chosen_Tk = logits_TN.gather(1, routing.expert_ids_TR)
    assert torch.allclose(routing.weights_TR, chosen_Tk.softmax(-1), atol=1e-6)
    assert logits_TN.topk(3).values.sum().item() == pytest.approx(chosen_Tk.sum().item())


def test_balance_loss_is_least_when_balanced() -> None:
    router = _topk(top_k=1, balance_weight=1.0)
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.weight[:, :EXPERTS] = 20 * torch.eye(EXPERTS)
    even_TD = torch.eye(WIDTH)[:EXPERTS].repeat(5, 1)
    skewed_TD = torch.eye(WIDTH)[:1].repeat(30, 1)
    assert router(even_TD).aux_loss.item() == pytest.approx(1.0, abs=1e-4)
    assert router(skewed_TD).aux_loss.item() == pytest.approx(EXPERTS, abs=1e-4)


def test_z_loss_and_no_loss() -> None:
    x_TD = torch.randn(9, WIDTH)
    with_z = _topk(top_k=1, balance_weight=0.0, z_loss_weight=0.5)
    want = 0.5 * with_z.gate(x_TD).logsumexp(-1).square().mean()
    assert torch.allclose(with_z(x_TD).aux_loss, want)
    assert _topk(top_k=1, balance_weight=0.0)(x_TD).aux_loss.item() == 0


def test_router_works_in_float32_under_bfloat16() -> None:
    router = _topk(top_k=2)
    x_TD = torch.randn(30, WIDTH).bfloat16()
    router.bfloat16()
    routing = router(x_TD)
    assert routing.weights_TR.dtype == torch.float32
    exact_TN = x_TD.double() @ router.gate.weight.double().t()
    assert torch.allclose(routing.weights_TR.double(), exact_TN.topk(2).values.softmax(-1), atol=1e-6)


def test_discrete_row_stands_last_with_the_gate_of_its_path() -> None:
    moe, book = MoEConfig(num_experts=EXPERTS, top_k=2), CodebookConfig(source=CodeSource.LAYER_STATE)
    router, bank = _vq(moe, book)
    x_TD = torch.randn(30, WIDTH)
    routing = router(x_TD, RoutingContext(codebooks=bank))
    gates_T2 = router.path_gate(x_TD).softmax(-1)
    codes_T = bank.lookup(0, bank.prepare(x_TD))
    assert torch.equal(routing.expert_ids_TR[:, 2], bank.code_map_LK[0][codes_T])
    assert torch.allclose(routing.weights_TR[:, 2], gates_T2[:, 1])
    assert torch.allclose(routing.weights_TR[:, :2].sum(-1), gates_T2[:, 0])
    assert torch.allclose(routing.weights_TR.sum(-1), torch.ones(30))


def test_known_experts_are_taken_as_they_are() -> None:
    moe, book = MoEConfig(num_experts=EXPERTS, top_k=1), CodebookConfig()
    router, bank = _vq(moe, book)
    ids_T = torch.arange(30) % EXPERTS
    routing = router(torch.randn(30, WIDTH), RoutingContext(ids_T.unsqueeze(1), codebooks=bank))
    assert torch.equal(routing.expert_ids_TR[:, -1], ids_T)
    assert bank.pending.sum() == 0, "who plans ahead observes ahead"


def test_offset_moves_only_the_discrete_row() -> None:
    moe = MoEConfig(num_experts=EXPERTS, top_k=1, code_blend=0.25)
    book = CodebookConfig(source=CodeSource.LAYER_STATE, normalize_source=False)
    router, bank = _vq(moe, book)
    x_TD = torch.randn(30, WIDTH, requires_grad=True)
    routing = router(x_TD, RoutingContext(codebooks=bank))
    codes_T = bank.lookup(0, bank.prepare(x_TD))
    assert torch.allclose(routing.discrete_offset_TD, 0.25 * (bank.codes_LKC[0][codes_T] - x_TD), atol=1e-6)
    assert not routing.discrete_offset_TD.requires_grad


def test_token_hash_is_balanced_and_differs_between_layers() -> None:
    table_LV = hash_of_tokens(64, 8, 3, seed=1)
    for table_V in table_LV:
        assert torch.bincount(table_V, minlength=8).tolist() == [8] * 8
    assert not torch.equal(table_LV[0], table_LV[1])
    assert torch.equal(table_LV, hash_of_tokens(64, 8, 3, seed=1))
    assert not torch.equal(table_LV, hash_of_tokens(64, 8, 3, seed=2))


@pytest.mark.parametrize(
    "router, source, ahead",
    [
        ("vq", CodeSource.CONTEXT, True),
        ("vq", CodeSource.TOKEN_EMBEDDING, True),
        ("vq", CodeSource.POSITION_EMBEDDING, True),
        ("vq", CodeSource.LAYER_STATE, False),
        ("vq", CodeSource.EARLY_BLOCK, False),
        ("hash_token", CodeSource.LAYER_STATE, True),
        ("topk", CodeSource.CONTEXT, False),
    ],
)
def test_which_routes_are_known_ahead(router: str, source: CodeSource, ahead: bool) -> None:
    run = RunConfig(moe={"router": router}, codebook={"source": source})
    assert run.moe.facts.known_ahead(run) is ahead


def test_layers_refuse_to_guess() -> None:
    book, x_BSD = CodebookConfig(source=CodeSource.LAYER_STATE), torch.randn(1, 4, WIDTH)
    with pytest.raises(ValueError, match="needs codebooks"):
        MoELayer(LayerConfig(WIDTH, MoEConfig(num_experts=4), codebook=book, shared_codebook=True))(x_BSD)
    with pytest.raises(ValueError, match=r"needs RoutingContext\.expert_ids_TR, 1 column"):
        MoELayer(LayerConfig(WIDTH, MoEConfig(router="hash_token", num_experts=4)))(x_BSD)
    third = LayerConfig(WIDTH, MoEConfig(num_experts=4), codebook=book, layer=2, shared_codebook=True)
    two = CodebookBank(book, 2, 4, WIDTH, 0)
    with pytest.raises(ValueError, match=r"layer 2 has no place among the 2 codebook\(s\)"):
        MoELayer(third)(x_BSD, RoutingContext(codebooks=two))
    with pytest.raises(ValueError, match="has a codebook of its own and was given others"):
        MoELayer(replace(third, shared_codebook=False))(x_BSD, RoutingContext(codebooks=two))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"moe": MoEConfig(router="fancy")}, "moe.router='fancy' is unknown"),
        ({"moe": MoEConfig(router="dense")}, "has no experts"),
        ({"moe": MoEConfig(router="topk", top_k=0)}, "leaves moe.router=topk without experts"),
        ({"moe": MoEConfig(router="xmoe"), "options": {"low_dims": 3}}, "low_dims"),
        ({"codebook": CodebookConfig()}, "codebook.source=context looks at more than the layer's input"),
        ({"codebook": CodebookConfig(source="layer_state", groups=2)}, "codebook.groups=2 needs the codes"),
        ({"moe": MoEConfig(num_experts=6), "ep_size": 4}, "ep_size=4 does not divide num_experts=6"),
        ({"width": 0}, "width=0 makes no layer; give 1 or more"),
        ({"ep_size": 2, "ep_rank": 2}, "ep_rank=2 is no place among the 2 rank(s)"),
        ({"moe": MoEConfig(router="stablemoe")}, "set LayerConfig.vocab_size"),
    ],
)
def test_a_layer_that_cannot_be_is_refused_in_a_sentence(options: dict, part: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        MoELayer(LayerConfig(**{"width": WIDTH, **options}))
    assert part in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_layer_of_codes_has_a_codebook_of_its_own() -> None:
    layer = MoELayer(LayerConfig(WIDTH, MoEConfig(num_experts=4, top_k=0), layer=3))
    experts_TR = layer(torch.randn(2, 5, WIDTH))[2]
    assert experts_TR.shape == (10, 1) and layer.router.own_codebook.pending[0, :, -1].sum() == 10


def test_spread_experts_need_a_group() -> None:
    layer = MoELayer(LayerConfig(WIDTH, MoEConfig(router="topk", num_experts=4), ep_size=2))
    with pytest.raises(ConfigError, match=r"call bind\(group\)"):
        layer(torch.randn(1, 4, WIDTH))

"""The routers of benchmarks/tried_routers.py: their contracts, and what they learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.moe.contracts import LENGTH, TWO, VOCAB, check_layouts, check_resume, check_router, config_of, leak
from tests.plugins import loaded
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, RoutingContext, StateSync

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, TOKENS, WIDTH = 8, 512, 16


@pytest.fixture(autouse=True)
def _plugin() -> Iterator[None]:
    with loaded(ROOT / "benchmarks/tried_routers.py", "expert_threshold", "hash_and_pair", "hash_and_mix"):
        yield


def test_pairs_of_codes_keep_the_contracts_of_a_router() -> None:
    check_router("hash_and_pair", codes=4)


def test_thresholds_keep_the_contracts_but_for_the_number_of_rows(tmp_path) -> None:
    moe = {"router": "expert_threshold", "top_k": 2}
    config = config_of(moe, {})
    tokens_BS = torch.randint(0, VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(2))
    assert leak(MoETransformer(config), tokens_BS, VOCAB) < 1e-5
    check_layouts({"threshold": config}, TWO, timeout=150)
    check_resume({"threshold": config}, tmp_path, timeout=100)


def test_every_expert_takes_its_share_however_scores_lie() -> None:
    """Scores of each expert stand at another place; a share of 2 / 8 is over the threshold that it learns."""
    layer = MoELayer(LayerConfig(WIDTH, MoEConfig(router="expert_threshold", num_experts=EXPERTS, top_k=2)))
    generator, sync = torch.Generator().manual_seed(1), StateSync(layer)
    for _ in range(60):
        x_BSD = torch.randn(1, TOKENS, WIDTH, generator=generator) + 1.0
        routing = layer.router(x_BSD[0])
        layer(x_BSD)
        sync.step()
    loads_N = routing.expert_ids_TR[:, 0].bincount(minlength=EXPERTS) / TOKENS
    assert ((loads_N - 0.25).abs() < 0.08).all(), loads_N
    scores_TN = layer.router.gate(x_BSD[0]).sigmoid()
    exact_N = scores_TN.quantile(0.75, dim=0)
    assert (layer.router.thresholds_N - exact_N).abs().max() < 0.05
    assert exact_N.max() - exact_N.min() > 0.2, "one threshold for all would not do"
    weights_M = scores_TN[routing.tokens_M, routing.expert_ids_TR[:, 0]]
    assert torch.equal(routing.weights_TR[:, 0], weights_M)


def test_a_pair_of_codebooks_tells_more_vectors_apart_than_its_codes_are() -> None:
    """Nine sums of three coarse and three fine steps get a pair each, of 4 codes and 4."""
    steps = torch.eye(WIDTH)
    points = torch.stack([8 * steps[a] + 2 * steps[8 + b] for a in range(3) for b in range(3)])
    moe = MoEConfig(router="hash_and_pair", num_experts=EXPERTS, expert_hidden=8)
    layer = MoELayer(LayerConfig(WIDTH, moe, options={"codes": 4}, vocab_size=VOCAB))
    router, sync = layer.router, StateSync(layer)
    router.pairs_P.copy_(torch.arange(16))
    layer.train()
    for _ in range(40):
        context = RoutingContext(token_ids_T=torch.zeros(90, dtype=torch.int64), source_TD=points.repeat(10, 1))
        experts_TR = router(torch.randn(90, WIDTH), context).expert_ids_TR
        sync.step()
    assert len(experts_TR[:9, 1].unique()) == 9
    assert torch.equal(experts_TR[:9], experts_TR[81:]) and len(experts_TR[:, 0].unique()) == 1


def test_codes_of_a_mixture_keep_the_contracts_of_a_router() -> None:
    check_router("hash_and_mix", codes=8)


def test_codes_look_at_the_token_that_the_loss_weighs_most() -> None:
    """The gate learns from the token before, so its weight grows; the code of a token then follows from that alone."""
    moe = MoEConfig(router="hash_and_mix", num_experts=EXPERTS, expert_hidden=8)
    layer = MoELayer(LayerConfig(WIDTH, moe, options={"codes": 8, "window": 2, "decay": 0.9}, vocab_size=VOCAB))
    router, sync, generator = layer.router, StateSync(layer), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([router.mixture_W, router.reader.weight], lr=0.1)
    vectors_VD = torch.randn(8, WIDTH, generator=generator)
    for _ in range(80):
        ids_T = torch.randint(0, 8, (64,), generator=generator)
        context = RoutingContext(token_ids_T=ids_T, source_TD=vectors_VD[ids_T], sequence=64)
        weights_TR = router(torch.zeros(64, WIDTH), context).weights_TR
        first_T = (ids_T < 4).roll(1)[1:].float()
        torch.nn.functional.binary_cross_entropy(weights_TR[1:, 0], first_T).backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
    assert router.slow_W[1] > 0.8 and torch.allclose(router.slow_W.sum(), torch.ones(()))
    experts_T = router(torch.randn(64, WIDTH), context).expert_ids_TR[1:, 1]
    for before in range(8):
        assert len(experts_T[ids_T[:-1] == before].unique()) == 1, "whatever the token itself and the state are"

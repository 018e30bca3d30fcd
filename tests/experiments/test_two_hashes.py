"""The control of ``hash_and_code``: two experts of a token by two hashes that know nothing of each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.moe.contracts import check_router
from tests.plugins import loaded
from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, RoutingContext

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, VOCAB = 8, 64


@pytest.fixture(autouse=True)
def _plugin() -> Iterator[None]:
    with loaded(ROOT / "benchmarks/two_hashes.py", "two_hashes"):
        yield


def _experts(ids_BS: torch.Tensor, layer: int = 0, seed: int = 0) -> torch.Tensor:
    moe = MoEConfig(router="two_hashes", num_experts=EXPERTS, expert_hidden=8)
    config = LayerConfig(16, moe, layer=layer, seed=seed, vocab_size=VOCAB)
    context = RoutingContext(token_ids_T=ids_BS.flatten())
    return MoELayer(config)(torch.randn(*ids_BS.shape, 16), context)[2].view(*ids_BS.shape, 2)


def test_it_keeps_the_contracts_of_a_router() -> None:
    check_router("two_hashes")


def test_each_hash_is_balanced_and_they_are_of_different_draws() -> None:
    every_B1 = torch.arange(VOCAB).unsqueeze(1)
    first = _experts(every_B1)[:, 0]
    for column in first.T:
        assert column.bincount(minlength=EXPERTS).tolist() == [VOCAB // EXPERTS] * EXPERTS
    others = [_experts(every_B1, layer=1)[:, 0], _experts(every_B1, seed=1)[:, 0]]
    columns = [column for experts in (first, *others) for column in experts.T]
    for place, column in enumerate(columns):
        for other in columns[:place]:
            assert (column == other).float().mean() < 0.5, "chance is an eighth"

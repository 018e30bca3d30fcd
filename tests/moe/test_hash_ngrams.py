"""Hashes of the last token, the last two, and so on, in a whole model: against loops, in pieces, beside padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import router_oracle as oracle
from tests.moe.choices import (
    EXPERTS,
    LENGTH,
    VOCAB,
    check_padding,
    check_pieces,
    check_planned_ahead,
    config_of,
    experts_of,
    tokens,
)
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, RoutingContext


def _config(router: str = "hash_ngrams", **options: Any) -> RunConfig:
    return config_of(router, 1, router=options)


@pytest.mark.parametrize("ngrams", [1, 2, 3, 8])
def test_every_expert_is_the_hash_of_its_window(ngrams: int) -> None:
    model, tokens_BS = MoETransformer(_config(ngrams=ngrams)), tokens()
    for experts_TR, tables in zip(experts_of(model, tokens_BS), model.token_table_LV.tolist(), strict=True):
        assert experts_TR.shape == (2 * LENGTH, ngrams)
        for window in range(1, ngrams + 1):
            own, tables = tables[:window], tables[window:]
            rows = [oracle.hash_of_context(ids_S, own, EXPERTS) for ids_S in tokens_BS.tolist()]
            assert experts_TR[:, window - 1].tolist() == [expert for row in rows for expert in row]
        assert not tables, "every table belongs to one window"


def test_the_first_expert_is_that_of_hash_token_and_one_alone_is_that_router() -> None:
    two, one, plain = (MoETransformer(c) for c in (_config(), _config(ngrams=1), _config("hash_token")))
    tokens_BS = tokens()
    pairs = zip(experts_of(two, tokens_BS), experts_of(plain, tokens_BS), strict=True)
    assert all(torch.equal(two_TR[:, :1], one_TR) for two_TR, one_TR in pairs)
    assert dict(one.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert torch.equal(one(tokens_BS)[0], plain(tokens_BS)[0])


def test_windows_hash_independently_of_each_other() -> None:
    """Tokens that share an expert by themselves spread over all by the pair of them and the same token before."""
    table = MoETransformer(_config(ngrams=2)).token_table_LV
    after_first_BS = torch.stack([torch.zeros(VOCAB, dtype=torch.int64), torch.arange(VOCAB)], dim=1)
    for experts_VR in _config().moe.facts.experts_of(table, after_first_BS, EXPERTS)[:, :, -1]:
        for expert in range(EXPERTS):
            assert len(experts_VR[experts_VR[:, 0] == expert, 1].unique()) > 1


def test_the_whole_dispatch_is_planned_before_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    check_planned_ahead(_config(), monkeypatch)


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 10]])
def test_a_text_read_piece_by_piece_goes_to_the_same_experts(pieces: list[int]) -> None:
    check_pieces(_config(ngrams=3), pieces)


def test_padding_changes_no_expert() -> None:
    check_padding(_config(ngrams=3))


@pytest.mark.parametrize("router", ["hash_ngrams", "hash_and_code"])
def test_a_layer_that_is_told_too_few_experts_says_so(router: str) -> None:
    layer = MoELayer(LayerConfig(8, MoEConfig(router=router, num_experts=4, expert_hidden=8), vocab_size=9))
    for told in (None, RoutingContext(torch.arange(3)), RoutingContext(torch.zeros(3, 3, dtype=torch.int64))):
        with pytest.raises(ValueError, match=rf"the {router} router needs RoutingContext.expert_ids_TR, 2 column"):
            layer(torch.randn(1, 3, 8), told)

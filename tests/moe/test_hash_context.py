"""The hash of the last tokens in a whole model: against loops, in texts read piece by piece, and beside padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import router_oracle as oracle
from tests.moe.choices import EXPERTS, LENGTH, VOCAB, check_padding, check_pieces, config_of, experts_of, tokens
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.runtime.errors import CheckpointError


def _config(router: str = "hash_context", top_k: int = 0, **options: Any) -> RunConfig:
    return config_of(router, top_k, router=options)


@pytest.mark.parametrize("window", [1, 2, 3, 30])
@pytest.mark.parametrize("top_k", [0, 1])
def test_experts_are_the_hash_of_the_window(window: int, top_k: int) -> None:
    model, tokens_BS = MoETransformer(_config(top_k=top_k, window=window)), tokens()
    chosen = experts_of(model, tokens_BS)
    for experts_TR, table_WV in zip(chosen, model.token_table_LV.tolist(), strict=True):
        rows = [oracle.hash_of_context(ids_S, table_WV, EXPERTS) for ids_S in tokens_BS.tolist()]
        assert experts_TR[:, -1].tolist() == [e for row in rows for e in row]
        assert experts_TR.shape[1] == top_k + 1


def test_a_window_of_one_is_the_hash_of_tokens() -> None:
    one, plain = (
        MoETransformer(_config(name, **o)) for name, o in (("hash_context", {"window": 1}), ("hash_token", {}))
    )
    assert torch.equal(one.token_table_LV.squeeze(1), plain.token_table_LV)
    assert torch.equal(one(tokens())[0], plain(tokens())[0])


def test_experts_depend_on_every_token_of_the_window_and_on_no_other() -> None:
    model, tokens_BS = MoETransformer(_config(window=3)), tokens()
    before = torch.stack([experts_TR.view(2, LENGTH) for experts_TR in experts_of(model, tokens_BS)])
    for place in (0, 5, LENGTH - 1):
        seen = torch.zeros(LENGTH, dtype=torch.bool)
        for other in range(VOCAB):
            changed_BS = tokens_BS.clone()
            changed_BS[:, place] = other
            after = torch.stack([experts_TR.view(2, LENGTH) for experts_TR in experts_of(model, changed_BS)])
            seen |= (before != after).any(dim=0).any(dim=0)
        assert seen.nonzero().flatten().tolist() == [t for t in range(place, place + 3) if t < LENGTH]


def test_contexts_spread_evenly_over_experts() -> None:
    table = MoETransformer(_config(window=3)).token_table_LV
    ids_BS = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)
    experts_LT = _config().moe.facts.experts_of(table, ids_BS, EXPERTS)[:, :, -1, 0]
    for experts_T in experts_LT:
        assert experts_T.bincount(minlength=EXPERTS).tolist() == [VOCAB**3 // EXPERTS] * EXPERTS


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 10]])
def test_a_text_read_piece_by_piece_goes_to_the_same_experts(pieces: list[int]) -> None:
    check_pieces(_config(top_k=1), pieces)


def test_padding_changes_no_expert() -> None:
    check_padding(_config())


def test_it_makes_no_table_of_tokens() -> None:
    from vqmoe_ds.experiments.token_table import table_of_codes

    with pytest.raises(CheckpointError, match="this model has router hash_context"):
        table_of_codes(MoETransformer(_config()))


def test_the_dual_path_starts_with_the_weights_of_codes() -> None:
    ours, codes = (MoETransformer(_config(name, 1)) for name in ("hash_context", "vq"))
    weights = dict(codes.named_parameters())
    assert dict(ours.named_parameters()).keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in ours.named_parameters())
    assert load_config("tiny", None, {"moe.router": "hash_context"}).config.rows_per_token == 2

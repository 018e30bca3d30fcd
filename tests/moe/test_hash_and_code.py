"""A hash of the token beside its code in a whole model: both known before the first block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.moe.choices import (
    LAYERS,
    LENGTH,
    check_padding,
    check_pieces,
    check_planned_ahead,
    config_of,
    experts_of,
    tokens,
)
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.runtime.errors import ConfigError


def _config(router: str = "hash_and_code", top_k: int = 1, **codebook: Any) -> RunConfig:
    return config_of(router, top_k, codebook=codebook)


@pytest.mark.parametrize("source", ["context", "token_embedding", "position_embedding"])
def test_one_expert_is_that_of_hash_token_and_the_other_that_of_codes(source: str) -> None:
    both, tokens_BS = MoETransformer(_config(source=source)), tokens()
    hashed, coded = MoETransformer(_config("hash_token")), MoETransformer(_config("vq", top_k=0, source=source))
    chosen = zip(experts_of(both, tokens_BS), experts_of(hashed, tokens_BS), experts_of(coded, tokens_BS), strict=True)
    assert all(torch.equal(two_TR, torch.cat([one_TR, other_TR], dim=1)) for two_TR, one_TR, other_TR in chosen)


def test_the_whole_dispatch_is_planned_before_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    check_planned_ahead(_config(), monkeypatch)


@pytest.mark.parametrize("by_then", ["gone", "damaged", "of another model"])
@pytest.mark.parametrize("router", ["hash_and_code", "hash_ngrams"])
def test_a_table_of_the_user_names_the_first_expert(router: str, by_then: str, tmp_path: Path) -> None:
    config = config_of(router, 1)
    table_LV = (torch.arange(config.model.vocab_size) // 3 % config.moe.num_experts).expand(LAYERS, -1).contiguous()
    save_file({"token_table": table_LV.int()}, tmp_path / "table.safetensors")
    options = config.router.model_copy(update={"path": str(tmp_path / "table.safetensors")})
    config = config.model_copy(update={"router": options})
    config.moe.facts.check_start(config, LAYERS)
    model, tokens_BS = MoETransformer(config), tokens()
    chosen = experts_of(model, tokens_BS)
    assert len(chosen) == LAYERS
    assert all(torch.equal(two_TR[:, 0], table_LV[0][tokens_BS.flatten()]) for two_TR in chosen)
    # The checkpoint brings the table, whatever became of the file
    (tmp_path / "table.safetensors").unlink()
    if by_then == "damaged":
        (tmp_path / "table.safetensors").write_bytes(b"no header")
    elif by_then == "of another model":
        save_file({"token_table": table_LV[:, 1:].contiguous()}, tmp_path / "table.safetensors")
    reopened = MoETransformer(config)
    reopened.load_state_dict(model.state_dict())
    assert all(torch.equal(*pair) for pair in zip(experts_of(reopened, tokens_BS), chosen, strict=True))
    with pytest.raises(ConfigError, match="does not exist|cannot be read|make a table for it"):
        config.moe.facts.check_start(config, LAYERS)


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 10]])
def test_a_text_read_piece_by_piece_goes_to_the_same_experts(pieces: list[int]) -> None:
    check_pieces(_config(), pieces)


def test_padding_changes_no_expert() -> None:
    check_padding(_config())


@pytest.mark.parametrize(
    "codebook, sentence",
    [
        ({"source": "layer_state"}, "codebook.source=layer_state looks at what comes later"),
        ({"source": "early_block"}, "codebook.source=early_block looks at what comes later"),
        ({"groups": 5, "num_codes": 25}, "codebook.groups=5 puts all experts of a token into one group"),
    ],
)
def test_what_is_not_known_ahead_is_refused(codebook: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _config(**codebook)

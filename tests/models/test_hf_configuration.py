"""The configuration of the exported model: what it declares, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from vqmoe_ds.models.hf import VQMoEConfig


def test_options_that_are_not_known_are_refused() -> None:
    known = "vq, topk, hash_token, hash_and_code, hash_ngrams, dense"
    with pytest.raises(ValueError, match=f"router='magic' is not one of {known}"):
        VQMoEConfig(router="magic")
    for groups, source in ((3, "context"), (2, "early_block")):
        with pytest.raises(ValueError, match=f"code_groups={groups} must divide num_experts=16, and needs code_source"):
            VQMoEConfig(code_groups=groups, code_source=source)
    assert VQMoEConfig(code_groups=3, router="topk").code_groups == 3


@pytest.mark.parametrize(("source", "groups"), [("layer_state", 1), ("early_block", 1), ("context", 2)])
def test_two_experts_that_are_known_ahead_need_codes_that_are(source: str, groups: int) -> None:
    with pytest.raises(ValueError, match="router='hash_and_code' needs code_groups=1 and code_source to be one of"):
        VQMoEConfig(router="hash_and_code", code_source=source, code_groups=groups)


def test_special_tokens_are_declared_and_other_models_options_refused() -> None:
    config = VQMoEConfig()
    assert config.eos_token_id is None and config.bos_token_id is None and config.pad_token_id is None
    with pytest.raises(ValueError, match="num_key_value_heads=3 does not divide num_attention_heads=4"):
        VQMoEConfig(num_key_value_heads=3)
    for option in (
        {"layer_types": ["sliding_attention"]},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"partial_rotary_factor": 0.5},
        {"attention_dropout": 0.1},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))}.*=.* is not one of"):
            VQMoEConfig(**option)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"sliding_window": 0}, "1 or more"),
        ({"rope_scaling_type": "linear", "rope_factor": 0.0}, "1 or more"),
        ({"rope_scaling_type": "yarn", "rope_original_length": 0, "rope_factor": 2.0}, "1 or more"),
        ({"moe_every": 0}, "1 or more"),
        ({"moe_every": 9}, "take router='dense', or more blocks"),
        ({"num_experts": 0}, "1 or more"),
        ({"num_experts_per_tok": 17}, "from 0 to 16"),
        ({"router": "topk", "num_experts_per_tok": 0}, "from 1 to 16"),
        ({"num_codes": 0}, "1 or more"),
        ({"code_dim": -1}, "0 or more"),
        ({"context_window": 0}, "1 or more"),
        ({"code_source": "early_block", "source_block": 4}, "from 0 to 3"),
        ({"router": "hash_ngrams", "ngrams": 0}, "ngrams=0 must be a whole number, from 1 to 8"),
        ({"router": "hash_ngrams", "ngrams": 100_000}, "from 1 to 8"),
        ({"router": "hash_ngrams", "ngrams": "2"}, "ngrams='2' must be a whole number"),
        ({"router": "hash_ngrams", "ngrams": 2.0}, "ngrams=2.0 must be a whole number"),
        ({"router": "hash_ngrams", "ngrams": True}, "ngrams=True must be a whole number"),
        ({"num_codes": "many"}, "num_codes='many' must be a whole number, 1 or more"),
        ({"head_dim": 31}, "even"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        VQMoEConfig(**options)
    VQMoEConfig(router="dense", moe_every=0, num_experts=0, num_codes=0)  # which looks at none of these

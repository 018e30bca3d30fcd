"""What routers can and cannot do: causality in the whole model, expert calls, and one sentence for what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.moe.contracts import leak
from vqmoe_ds.checkpoint.formats.huggingface.names import why_not_exported
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.routers import routers
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.evaluation.sample import sample_tokens
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.state_sync import StateSync
from vqmoe_ds.runtime.errors import ConfigError

VOCAB, LENGTH = 40, 16
WITHIN_SEQUENCES = [("expert_choice", {}), ("softmoe", {}), ("softmoe_ac", {})]
OF_THE_BATCH = [("adaptive_clustering", {"statistics": "batch"}), ("softmoe_ac", {"statistics": "batch"})]
NOT_CAUSAL = [*WITHIN_SEQUENCES, *OF_THE_BATCH]
CAUSAL = [(name, {}) for name in routers() if (name, {}) not in NOT_CAUSAL]


def _config(router: str, options: dict[str, Any] | None = None, **moe: Any) -> RunConfig:
    model = {"vocab_size": VOCAB, "layers": 3, "width": 24, "heads": 2, "sequence_length": LENGTH}
    shape = {"router": router, "num_experts": 4, "expert_hidden": 12, "top_k": 2, **moe}
    return RunConfig(model=model, moe=shape, router=options or {}, train={"steps": 4})


def _leak(config: RunConfig) -> float:
    """Change of the first nine positions' logits when later tokens change, after some steps of training."""
    model = MoETransformer(config)
    sync = StateSync(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        tokens_BS = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=generator)
        sum(model(tokens_BS[:, :-1], tokens_BS[:, 1:])).backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
    return leak(model, tokens_BS[:, :LENGTH], VOCAB)


@pytest.mark.parametrize(("router", "options"), CAUSAL, ids=lambda value: str(value))
def test_causal_routers_see_no_later_token(router: str, options: dict[str, Any]) -> None:
    config = _config(router, options)
    assert config.looks_ahead is None
    config.require_causal("anything")
    assert _leak(config) < 1e-5, "float32 rounding is all there may be"


@pytest.mark.parametrize(("router", "options"), NOT_CAUSAL)
def test_routers_that_look_ahead_do_and_are_refused(router: str, options: dict[str, Any]) -> None:
    config = _config(router, options)
    assert _leak(config) > 1e-3
    with pytest.raises(
        ConfigError, match="generating text needs a router that sees no later token, but .*; .*use|train"
    ):
        sample_tokens(SimpleNamespace(config=SimpleNamespace(run=config)), [1], 5, VOCAB)


def test_neighbours_in_a_batch_matter_to_batch_statistics_alone() -> None:
    alone = [(router, options, False) for router, options in [*CAUSAL, *WITHIN_SEQUENCES]]
    for router, options, apart in [*alone, *((router, options, True) for router, options in OF_THE_BATCH)]:
        model = MoETransformer(_config(router, options)).eval()
        tokens_BS = torch.randint(0, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            together, alone = model(tokens_BS)[0][:1], model(tokens_BS[:1])[0]
        assert bool((together - alone).abs().max() > 1e-4) is apart, router


@pytest.mark.parametrize("router", list(routers()))
def test_every_parameter_learns_and_counts_are_those_announced(router: str) -> None:
    config = _config(router, {"final_top_k": 2})
    model = MoETransformer(config)
    tokens_BS = torch.randint(0, VOCAB, (8, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    sum(model(tokens_BS[:, :-1], tokens_BS[:, 1:])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for layer in model.moe_layers():
        assert layer.tokens_per_expert.sum() == 8 * LENGTH * config.rows_per_token


def test_expert_calls_of_a_growing_k_are_its_mean() -> None:
    growing = {"num_experts": 16, "top_k": 1}
    assert _config("smoe_dropout", {"final_top_k": 3}, **growing).rows_per_token == 2
    assert _config("smoe_dropout", **growing).rows_per_token == 9
    assert _config("expert_choice").rows_per_token == 2


def test_expert_calls_of_slots_go_by_the_length_of_a_sequence() -> None:
    for options, moe, slots, rows in (
        ({}, {"top_k": 2}, 8, 2),
        ({}, {"top_k": 1}, 4, 1),
        ({}, {"top_k": 1, "num_experts": 64}, 1, 4),
        ({"slots": 3}, {"top_k": 1}, 3, 1),
        ({"slots": 5}, {"top_k": 1}, 5, 2),
    ):
        config = _config("softmoe", options, **moe)
        model = MoETransformer(config)
        model(torch.zeros(3, LENGTH, dtype=torch.int64))
        assert config.rows_per_token == rows
        for layer in model.moe_layers():
            assert layer.tokens_per_expert.tolist() == [3 * slots] * config.moe.num_experts


@pytest.mark.parametrize(
    "overrides, part",
    [
        ({"moe.router": "xmoe", "moe.top_k": 0}, "moe.top_k=0 leaves moe.router=xmoe without experts"),
        (
            {"moe.router": "smoe_dropout", "router.final_top_k": 99},
            "router.final_top_k=99 must lie between moe.top_k=1",
        ),
        (
            {"moe.router": "topk_context", "codebook.source": "layer_state"},
            "moe.router=topk_context reads what is known before the first block, not codebook.source=layer_state",
        ),
        ({"codebook.init": "normal"}, "codebook.init=normal looks at no data, and codebook.code_map=balanced needs"),
        ({"moe.router": "adaptive_clustering", "model.layers": 1}, "it needs two or more: raise model.layers=1"),
        ({"moe.router": "adaptive_clustering", "model.moe_every": 4}, "or lower model.moe_every=4"),
        (
            {"moe.router": "softmoe_ac", "model.layers": 1},
            "moe.router=softmoe_ac looks at the choices of the MoE layer before, so it needs two or more",
        ),
        (
            {"moe.router": "softmoe", "finetune.classes": ("a", "b"), "finetune.checkpoint": "runs/x"},
            "moe.router=softmoe mixes the tokens of sequences of one length, and texts to classify have any",
        ),
        (
            {"moe.router": "adaptive_clustering", "router.plain_layers": 4},
            "router.plain_layers=4 leaves no layer to moe.router=adaptive_clustering, of 4 MoE layers; lower it",
        ),
        ({"router.temperature": 0}, "configuration field router.temperature=0"),
        ({"router.statistic": "batch"}, "did you mean router.statistics?"),
        ({"moe.router": "kmeans"}, "moe.router='kmeans' is unknown; "),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(overrides: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config("tiny", None, overrides)
    assert part in str(refusal.value) and "\n" not in str(refusal.value)


def test_export_names_the_router_it_does_not_know() -> None:
    for router in routers():
        reason = why_not_exported(_config(router).moe)
        exported = router in ("vq", "topk", "hash_token", "hash_and_code", "hash_ngrams", "token_table", "dense")
        assert (reason is None) is exported
        assert exported or f"moe.router={router} is not among" in str(reason)
    assert why_not_exported(_config("vq", input_norm=True, output_norm=True).moe) is None
    transformers = pytest.importorskip("transformers")
    assert transformers
    from vqmoe_ds.models.hf import VQMoEConfig

    known = "vq, topk, hash_token, hash_and_code, hash_ngrams, dense"
    with pytest.raises(ValueError, match=f"router='xmoe' is not one of {known}"):
        VQMoEConfig(router="xmoe")

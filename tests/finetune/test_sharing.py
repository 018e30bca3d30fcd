"""Ranks that share labelled texts, of which some hold padding alone, learn what ranks with whole texts learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.layouts import Layout, write_one
from tests.distributed import run_ranks
from tests.finetune.small import Finetuning, tensors, texts
from tests.finetune.test_padding import CASES, config_of, tokens_of
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.build import build_model
from vqmoe_ds.models.ulysses import sequence_share

WORLD = 4
SHARED = [case for case in CASES if case != "expert_choice"]
MORE: dict[str, dict[str, Any]] = {
    "the paper's input": {
        **{"codebook.source": "layer_state", "codebook.normalize_source": False, "codebook.commitment_weight": 0.1},
        **{"moe.code_blend": 1.0, "moe.top_k": 1},
    }
}
LABELS_B = torch.tensor([2, 0, 1])


def _config(case: str, size: int, **more: Any) -> RunConfig:
    changes = {**MORE.get(case, {}), **more, "model.heads": 4, "train.sequence_parallel_size": size}
    return config_of(case if case in CASES else "vq", **changes)


def _measure(config: RunConfig, rank: int) -> dict[str, Tensor]:
    """Logits, and sums over ranks of what adds up, means of what is averaged."""
    model = build_model(config)
    share = sequence_share(config, rank)
    if share is not None:
        model.share_sequences(share)
    logits_BC, _ = model(tokens_of(9))
    if model.bank is not None:
        model.bank.clear_statistics()
    for layer in model.moe_layers():
        layer.tokens_per_expert.zero_()
        if hasattr(layer.router, "clear_statistics"):
            layer.router.clear_statistics()
    loss, aux = model(tokens_of(9), LABELS_B)
    (loss + aux).backward()
    means = {"loss": loss.detach(), "aux": aux.detach()}
    means |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    sums = {f"rows {i}": layer.tokens_per_expert for i, layer in enumerate(model.moe_layers())}
    sums |= {f"state {i}": m.router.pending for i, m in enumerate(model.moe_layers()) if hasattr(m.router, "pending")}
    if model.bank is not None:
        sums |= {"codes": model.bank.pending, "samples": model.bank.samples(0, 7)}
    if share is not None:
        means = {name: share.mean(value) for name, value in means.items()}
        sums = {name: share.total(value) for name, value in sums.items()}
    return {"logits": logits_BC.detach(), **means, **sums}


def _furthest(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return max((one - other).abs().flatten().tolist(), default=0.0)


def _differences(rank: int, world: int, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, float]]:
    found = []
    for case, more in cases:
        whole = _measure(_config(case, 1, **more), rank)
        for size in (2, 4):
            parts = _measure(_config(case, size, **more), rank)
            assert parts.keys() == whole.keys()
            found.append({name: _furthest(parts[name], value) for name, value in whole.items()})
    return found


def test_every_router_computes_of_parts_what_it_computes_of_whole_texts() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [(case, {}) for case in (*SHARED, *MORE)]
    cases += [("vq", {"finetune.pool": "last"}), ("topk", {"finetune.pool": "last"})]
    cases += [("topk", {"train.activation_checkpointing": True})]
    for answers in run_ranks(WORLD, _differences, cases):
        for (case, more), found in zip([c for c in cases for _ in range(2)], answers, strict=True):
            assert {name: value for name, value in found.items() if value > 1e-5} == {}, (case, more)


# ------------------------------------------------------------------ training

STEPS = 12
BOTH_PATHS = {"finetune.discrete": False, "finetune.trainable": "all", "codebook.dead_below": 0.2}
"""Routers learn, and codes move and are placed anew, so that routes change."""
REFERENCE = (Layout(0, 1, WORLD), 1)
LAYOUTS = [(Layout(2, 2, WORLD), 4), (Layout(3, 4, WORLD), 2), (Layout(1, 1, WORLD), 4)]


def _finetune(rank: int, world: int, folder: str, jobs: list[tuple[Layout, int]]) -> list[dict[str, Any]]:
    from vqmoe_ds.evaluation.classification import classify
    from vqmoe_ds.evaluation.routing import RoutingHealth

    source, found = Path(folder) / "source", []
    source.mkdir(exist_ok=True)
    write_one(rank, world, str(source), Layout(0, 1, world), {"model.heads": 4})
    for number, (layout, size) in enumerate(jobs):
        tuning = Finetuning(Path(folder), layout, rank, source, **BOTH_PATHS, **{"train.sequence_parallel_size": size})
        held_out = texts(50, seed=1)
        health = RoutingHealth(tuning.session, held_out, 64)
        health.measure()
        losses = tuning.train(STEPS)
        score = classify(tuning.session, held_out)
        few = classify(tuning.session, held_out, max_batches=1)
        weights = tensors(tuning.save(Path(folder) / f"end{number}"))
        found.append(
            {
                "losses": losses,
                "scores": [score.loss, score.accuracy, *score.probabilities_T],
                "few": len(few.labels_T),
                "health": health.measure(),
                "weights": weights,
            }
        )
        tuning.session.engine.destroy()
    return found


def test_layouts_that_share_texts_learn_and_score_alike(tmp_path: Path) -> None:
    answers = run_ranks(WORLD, _finetune, str(tmp_path), [REFERENCE, *LAYOUTS])
    whole = answers[0][0]
    assert whole["losses"][-1] < whole["losses"][0] - 0.1, "nothing was learned"
    assert sum(whole["health"]["fluctuation"]) > 0 and whole["few"] == 50
    for answer in answers:
        for layout, found in zip(LAYOUTS, answer[1:], strict=True):
            assert found["losses"] == pytest.approx(whole["losses"], abs=1e-5), layout
            assert found["scores"] == pytest.approx(whole["scores"], abs=1e-4), layout
            assert found["health"] == whole["health"], layout
            for name, weights in whole["weights"].items():
                assert torch.allclose(found["weights"][name], weights, atol=1e-4), (layout, name)

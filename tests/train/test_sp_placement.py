"""Tokens that are computed on the rank of their experts train the model of tokens that stay at their positions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.train.test_sequence_parallel import (
    BATCH,
    LENGTH,
    REFERENCE,
    WORLD,
    Layout,
    _compare,
    _config,
    _engine_config,
    _train,
    _trainer,
)
from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.schema import RunConfig, SequencePlacement
from vqmoe_ds.evaluation.routing import heard
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.dispatch import _all_to_all
from vqmoe_ds.planning import parameters, traffic
from vqmoe_ds.runtime.errors import ConfigError

HOME = {"train": {"sp_placement": SequencePlacement.EXPERT}}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "context": {"codebook": {"source": "context", "num_codes": 20, "context_window": 5, "code_map": "balanced"}},
    "tokens, recomputed": {
        "codebook": {"source": "token_embedding"},
        "train": {"activation_checkpointing": True},
        "model": {"layers": 3},
    },
    "context beside top-1": {
        "codebook": {"source": "context", "num_codes": 20},
        "moe": {"top_k": 1},
        "train": {"activation_checkpointing": True},
    },
    "grouped queries": {"codebook": {"source": "context"}, "model": {"kv_heads": 2}},
    "sliding window": {"codebook": {"source": "context"}, "model": {"sliding_window": 5}},
    "documents kept apart": {
        "codebook": {"source": "context", "num_codes": 20, "context_window": 5},
        "data": {"separate_documents": True},
    },
    "ranks without tokens": {"codebook": {"source": "token_embedding", "num_codes": 2}},  # all in the first group
    "positions, every second block": {
        "codebook": {"source": "position_embedding"},
        "model": {"layers": 4, "moe_every": 2, "qk_norm": "heads"},
    },
}


def grouped(case: str, *more: dict[str, dict[str, Any]], router: str = "tokens, discrete only") -> RunConfig:
    values = _config(router).model_dump()
    for changes in ({"codebook": {"groups": 4}}, CASES[case], *more):
        for section, changed in changes.items():
            values[section] |= changed
    return RunConfig.model_validate(values)


# ------------------------------------------------------------------ the same model


def _check(folder: Path, matrix: dict[str, list[Layout]]) -> None:
    jobs, ends = [], [0]
    for case, layouts in matrix.items():
        jobs += [(grouped(case), REFERENCE), *((grouped(case, HOME), layout) for layout in layouts)]
        ends.append(len(jobs))
    answers = run_ranks(WORLD, _train, folder, jobs, timeout=280)
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        _compare([answer[start:end] for answer in answers], jobs[start:end])


def test_tokens_at_their_experts_train_the_same_model(tmp_path: Path) -> None:
    few = {
        "context": [Layout(4, 4, 2)],
        "context beside top-1": [Layout(4, 2, 1)],
        "grouped queries": [Layout(2, 2, 0)],
        "sliding window": [Layout(2, 2, 0)],
        "documents kept apart": [Layout(4, 4, 1)],
        "ranks without tokens": [Layout(4, 4, 2)],
    }
    _check(tmp_path, few)


@pytest.mark.slow
def test_every_source_stage_and_layout(tmp_path: Path) -> None:
    layouts = [Layout(2, 2, 0), Layout(4, 4, 3), Layout(4, 2, 1)]
    _check(tmp_path, {**dict.fromkeys(CASES, layouts), "grouped queries": layouts[:1]})


# ------------------------------------------------------------------ the same routes


def _routes(rank: int, world: int, folder: Path, jobs: list[tuple[RunConfig, Layout]]) -> list[tuple[Any, Any]]:
    """Places ``b * S + s`` of this rank's tokens, and their experts ``[L, T, R]``, of one forward pass in training."""
    found = []
    for config, layout in jobs:
        trainer = _trainer(folder, rank, config, layout)
        model, places = trainer.session.model.train(), torch.arange(2 * LENGTH).view(2, LENGTH)
        tokens_BS = torch.randint(0, config.model.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(5))
        if model.share is not None:
            places = places[:, model.share.span]
        if model._by_expert(None):
            places = model._homes(tokens_BS, None)[0].mine_M
        with heard(model.moe_layers(), lambda _layer, _inputs, outputs: outputs[2]) as seen:
            model(tokens_BS, tokens_BS)
        found.append((places.flatten(), torch.stack(seen)))
        trainer.session.engine.destroy()
    return found


def test_every_layout_sends_every_token_to_the_same_experts(tmp_path: Path) -> None:
    """Shared sequences and experts, tokens at their positions or experts; codes, and top-1 beside them."""
    config = grouped("context beside top-1")
    jobs = [(config, REFERENCE), (config, Layout(4, 2, 1)), (grouped("context beside top-1", HOME), Layout(4, 4, 1))]
    reference, *parts = zip(*run_ranks(WORLD, _routes, tmp_path, jobs), strict=True)
    whole_LTR = reference[0][1]
    assert len(whole_LTR.unique()) > 4
    for layout in parts:
        places_T = torch.cat([places for places, _ in layout])
        routes_LTR = torch.cat([routes for _, routes in layout], dim=1)
        assert torch.equal(places_T.sort().values, torch.arange(2 * LENGTH))
        assert torch.equal(routes_LTR, whole_LTR[:, places_T])
    assert not torch.equal(parts[0][0][0], parts[1][0][0]), "these tokens are not at their positions"


# ------------------------------------------------------------------ bytes


def _count(rank: int, world: int, folder: Path, jobs: list[tuple[RunConfig, Layout]]) -> list[int]:
    """Values that crossed to another rank in all-to-alls of one step."""
    from vqmoe_ds.moe import dispatch

    found = []
    for job in jobs:
        trainer, crossed = _trainer(folder, rank, *job), [0]
        trainer.train_step()

        def counted(rows, send, receive, group, works=None, crossed=crossed):
            here = torch.distributed.get_rank(group)
            crossed[0] += rows.shape[1] * (sum(send) - send[here])
            return _all_to_all(rows, send, receive, group, works)

        dispatch._all_to_all = counted
        try:
            trainer.train_step()
        finally:
            dispatch._all_to_all = _all_to_all
        found.append(crossed[0])
        trainer.session.engine.destroy()
    return found


def test_no_row_travels_to_an_expert(tmp_path: Path) -> None:
    layout = Layout(4, 4, 1)
    jobs = [(grouped("context"), layout), (grouped("context", HOME), layout)]
    by_position, by_expert = (sum(counts) for counts in zip(*run_ranks(WORLD, _count, tmp_path, jobs), strict=True))
    model = jobs[0][0].model
    # Queries, keys, values and outputs, there and, as gradients, back: all but the quarter that stays.
    around_attention = 2 * 4 * model.layers * model.width * BATCH * LENGTH * 3 // 4
    assert by_expert == around_attention
    assert by_position > 1.2 * around_attention


def _planned(folder: Path, config: RunConfig) -> dict[str, int]:
    engine: EngineConfig = _engine_config(folder, 0, config, Layout(4, 4, 1))
    return {t.purpose: t.payload for t in traffic.transfers(parameters.count(config), engine)}


def test_the_plan_knows_what_travels(tmp_path: Path) -> None:
    by_position, by_expert = _planned(tmp_path, grouped("context")), _planned(tmp_path, grouped("context", HOME))
    assert by_position.keys() - by_expert.keys() == {"expert rows", "row counts"}
    assert by_expert["expert numbers"] == 2 * 2 * BATCH * LENGTH // 2 * 8  # layers, micro-batches of half the batch
    assert by_position["heads and positions"] == by_expert["heads and positions"]


# ------------------------------------------------------------------ groups


def test_the_first_layer_names_the_group_of_all() -> None:
    book = grouped("context").codebook
    bank = CodebookBank(book, num_layers=3, num_experts=8, width=4, seed=0)
    bank.code_map_LK.copy_(torch.randint(8, bank.code_map_LK.shape, generator=torch.Generator().manual_seed(0)))
    codes_LT = torch.randint(20, (3, 100), generator=torch.Generator().manual_seed(1))
    experts_LT, alone_LT = bank.experts_of(codes_LT), bank.code_map_LK.gather(1, codes_LT)
    assert torch.equal(experts_LT[0], alone_LT[0])
    assert torch.equal(experts_LT // 2, alone_LT[:1].expand(3, -1) // 2)
    assert torch.equal(experts_LT % 2, alone_LT % 2)


@pytest.mark.parametrize(
    ("changes", "layout", "sentence"),
    [
        (
            {},
            Layout(1, 2, 1),
            "needs ranks that share sequences and experts, and there are --sp_size 1 and --ep_size 2",
        ),
        ({}, Layout(2, 1, 1), "there are --sp_size 2 and --ep_size 1"),
        ({}, Layout(2, 4, 1), "needs all 4 ranks that share experts among the 2 that share sequences"),
        ({"codebook": {"groups": 2}}, Layout(4, 4, 1), "set codebook.groups to a multiple of --ep_size 4"),
        ({"finetune": {"classes": ["a", "b"]}}, Layout(2, 2, 1), "needs texts of one length, and those to"),
        ({"moe": {"router": "topk", "top_k": 1}}, Layout(2, 2, 1), "experts that codes name: set moe.router=vq"),
    ],
)
def test_what_has_no_home_is_refused(tmp_path, changes, layout, sentence):
    with pytest.raises(ConfigError, match=f"train.sp_placement=expert .*{re.escape(sentence)}"):
        _engine_config(tmp_path, 0, grouped("context", HOME, changes), layout)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"groups": 3}, "codebook.groups=3 does not divide moe.num_experts=8"),
        ({"source": "layer_state"}, "codebook.groups=4 needs the codes of all layers before the first block"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        grouped("context", {"codebook": changes})

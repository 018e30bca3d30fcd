"""Fine-tuning on real ranks: every layout starts from the pretrained weights, learns the same, freezes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.layouts import Layout, write_one
from tests.distributed import run_ranks
from tests.finetune.small import CLASSES, Finetuning, tensors
from vqmoe_ds.checkpoint.open import open_checkpoint

SOURCES: dict[str, dict[str, Any]] = {
    "vq": {"codebook.source_momentum": 0.0},
    "topk": {"moe.router": "topk", "moe.top_k": 2},
    "dense": {"moe.router": "dense"},
}
STEPS = 3
ONE = Layout(0, 1, 1)


def _pretrain(rank: int, world: int, folder: str) -> None:
    for name, changes in SOURCES.items():
        path = Path(folder) / name
        path.mkdir(exist_ok=True)
        write_one(rank, world, str(path), Layout(2, 1 if name == "dense" else 2, 2), changes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    run_ranks(2, _pretrain, str(folder))
    return folder


Case = tuple[str, Layout, dict[str, Any]]


def _finetune(rank: int, world: int, sources: str, folder: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Of each case: the weights at the start and after some steps as a checkpoint has them, losses, codes."""
    found = []
    for number, (source, layout, changes) in enumerate(cases):
        tuning = Finetuning(Path(folder), layout, rank, Path(sources) / source, **changes)
        bank = tuning.session.model.bank
        before = None if bank is None else (tuning.codes(), bank.codes_LKC.clone())
        start = tensors(tuning.save(Path(folder) / f"start{number}-{layout}"))
        losses = tuning.train(STEPS)
        reader = tuning.save(Path(folder) / f"end{number}-{layout}")
        end = tensors(reader)
        after = None if bank is None else (tuning.codes(), bank.codes_LKC.clone())
        losses += tuning.train(2)
        found.append(
            {"start": start, "losses": losses, "end": end, "frozen": reader.frozen, "codes": (before, after)}
            if rank == 0
            else {"losses": losses}
        )
        tuning.session.engine.destroy()
    return found


def _go_on(rank: int, world: int, sources: str, folder: str, jobs: list[tuple[str, Case]]) -> list[list[float]]:
    """Losses of two further steps on another layout."""
    losses = []
    for tag, (source, layout, changes) in jobs:
        tuning = Finetuning(Path(folder), layout, rank, Path(sources) / source, **changes)
        tuning.resume(open_checkpoint(Path(folder) / tag).path)
        losses.append(tuning.train(2))
        tuning.session.engine.destroy()
    return losses


def test_layouts_start_alike_learn_alike_and_go_on_from_each_other(sources, tmp_path):
    """ZeRO 0, 2 and 3, EP 1 and 2, one and two ranks with 4 and 2 accumulation steps; vq on its discrete path."""
    spread = [Layout(2, 2, 2), Layout(3, 2, 2), Layout(3, 1, 2), Layout(0, 2, 2)]
    (alone,) = run_ranks(1, _finetune, str(sources), str(tmp_path), [("vq", ONE, {})])[0]
    many = run_ranks(2, _finetune, str(sources), str(tmp_path), [("vq", layout, {}) for layout in spread])[0]
    source = tensors(open_checkpoint(sources / "vq"))
    assert alone["losses"][-1] < alone["losses"][0]
    for name, weights in alone["start"].items():
        if name != "head.weight":
            assert torch.equal(weights, source[name]), name
    for layout, one in zip(spread, many, strict=True):
        assert one["losses"] == pytest.approx(alone["losses"], abs=1e-5), layout
        assert one["frozen"] == alone["frozen"]
        for name, weights in one["start"].items():
            assert torch.equal(weights, alone["start"][name]), (layout, name)
        for name, weights in one["end"].items():
            moved = not torch.equal(weights, one["start"][name])
            assert moved == (".experts." in name or name == "head.weight"), (layout, name)
    jobs = [(f"end1-{spread[1]}", ("vq", ONE, {})), (f"end3-{spread[3]}", ("vq", ONE, {}))]
    back = run_ranks(1, _go_on, str(sources), str(tmp_path), jobs)[0]
    (there,) = run_ranks(2, _go_on, str(sources), str(tmp_path), [(f"end0-{ONE}", ("vq", Layout(3, 2, 2), {}))])[0]
    for losses in [*back, there]:
        assert losses == pytest.approx(alone["losses"][STEPS:], abs=1e-5)


def test_what_is_frozen_stays_bit_for_bit_and_no_token_changes_its_code(sources, tmp_path):
    cases: list[Case] = [
        ("vq", ONE, {"finetune.trainable": "all"}),
        ("vq", ONE, {"finetune.trainable": "head"}),
        ("vq", ONE, {"finetune.lora_rank": 2, "finetune.trainable": "head"}),
        ("vq", ONE, {"finetune.discrete": False}),
        ("topk", ONE, {}),
        ("dense", ONE, {}),
    ]
    pytest.importorskip("peft")
    everything, head, lora, both, topk, dense = run_ranks(1, _finetune, str(sources), str(tmp_path), cases)[0]

    def moved(case: dict[str, Any]) -> set[str]:
        return {name for name, weights in case["end"].items() if not torch.equal(weights, case["start"][name])}

    assert moved(everything) == set(everything["end"])
    for case in (everything, head, lora):
        (codes, book), (codes_after, book_after) = case["codes"]
        assert torch.equal(codes, codes_after)
        assert torch.equal(book, book_after)
        assert not any(".router." in name for name in case["end"])
    assert moved(head) == {"head.weight"}
    assert head["end"]["head.weight"].shape == (len(CLASSES), 16)
    adapters = {name for name in lora["end"] if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 2
    assert moved(lora) == adapters | {"head.weight"}
    assert any(".router.path_gate." in name for name in both["end"])
    assert moved(both) == {name for name in both["end"] if ".experts." in name} | {"head.weight"}
    assert not torch.equal(both["codes"][0][1], both["codes"][1][1]), "both paths keep a codebook that moves"
    assert moved(topk) == {name for name in topk["end"] if ".experts." in name} | {"head.weight"}
    assert moved(dense) == {name for name in dense["end"] if ".mlp." in name} | {"head.weight"}


@pytest.mark.slow
def test_other_routers_and_choices_learn_alike_on_every_layout(sources, tmp_path):
    cases: list[tuple[str, dict[str, Any]]] = [
        ("vq", {"finetune.trainable": "all"}),
        ("topk", {"moe.balance_weight": 0.0, "finetune.trainable": "all"}),
        ("vq", {"finetune.lora_rank": 2}),
    ]
    alone = run_ranks(1, _finetune, str(sources), str(tmp_path), [(s, ONE, c) for s, c in cases])[0]
    for layout in (Layout(1, 2, 2), Layout(2, 2, 2), Layout(3, 2, 2)):
        spread = [(s, layout, c) for s, c in cases]
        for one, many in zip(alone, run_ranks(2, _finetune, str(sources), str(tmp_path), spread)[0], strict=True):
            assert many["losses"] == pytest.approx(one["losses"], abs=1e-5), layout
            for name, weights in many["start"].items():
                assert torch.equal(weights, one["start"][name]), (layout, name)

"""A checkpoint of any layout goes on in any other as if it had never moved."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from tests.checkpoint.layouts import ALL, SAVED_AT, Layout, Training, load_natively, move, write_sources
from tests.distributed import RankFailure, run_ranks
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.reader import KINDS, CheckpointReader

STEPS = 10
PAIRS = [
    (Layout(0, 1, 1), Layout(3, 4, 4)),
    (Layout(0, 1, 1), Layout(2, 1, 2)),
    (Layout(1, 2, 2), Layout(0, 2, 4)),
    (Layout(1, 2, 2), Layout(3, 1, 1)),
    (Layout(2, 4, 4), Layout(1, 2, 2)),
    (Layout(2, 4, 4), Layout(0, 1, 1)),
    (Layout(3, 2, 4), Layout(3, 2, 2, extra="p")),
    (Layout(3, 2, 4), Layout(1, 4, 4)),
    (Layout(3, 2, 4), Layout(2, 1, 1)),
    (Layout(2, 2, 2, extra="o"), Layout(3, 1, 2, extra="o")),
]
BF16_PAIRS = [
    (Layout(0, 2, 2, "bf16"), Layout(3, 1, 2, "bf16")),
    (Layout(3, 2, 2, "bf16"), Layout(0, 2, 2, "bf16")),
    (Layout(3, 2, 2, "bf16"), Layout(1, 1, 1, "bf16")),
    (Layout(1, 2, 2), Layout(2, 1, 2, "bf16")),
    (Layout(3, 2, 2, "bf16"), Layout(0, 1, 1)),
]

LATER = {*PAIRS[1:8:2], *BF16_PAIRS[1:3]}
"""Pairs whose kinds of source and target others have: slow tests."""


def _each(pairs):
    marks = {pair: [pytest.mark.slow] if pair in LATER else [] for pair in pairs}
    return [pytest.param(pair, marks=marks[pair], id=f"{pair[0]} to {pair[1]}") for pair in pairs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


def _by_world(layouts):
    groups = defaultdict(list)
    for layout in dict.fromkeys(layouts):
        groups[layout.world].append(layout)
    return groups


def _sources(folder, layouts, steps):
    losses = {}
    for world, some in _by_world(layouts).items():
        losses.update(run_ranks(world, write_sources, str(folder), some, steps, timeout=900)[0])
    return losses


def _moved(folder, pairs, steps, save_to=""):
    losses = {}
    for world in sorted({target.world for _, target in pairs}):
        jobs = [(str(source), target) for source, target in pairs if target.world == world]
        found = run_ranks(world, move, str(folder), jobs, steps, save_to, timeout=900)[0]
        losses.update(zip([pair for pair in pairs if pair[1].world == world], found, strict=True))
    return losses


@pytest.fixture(scope="module")
def stayed(folder):
    return _sources(folder, [source for source, _ in [*PAIRS, *BF16_PAIRS]], STEPS)


@pytest.fixture(scope="module")
def moved(folder, stayed):
    """Function of a pair: its losses, for which all pairs that are later or not, as it is, have moved."""

    @functools.cache
    def move_all(later):
        pairs = [pair for pair in [*PAIRS, *BF16_PAIRS] if (pair in LATER) == later]
        return _moved(folder, pairs, STEPS, save_to="again")

    return lambda pair: move_all(pair in LATER)[pair]


def assert_equal_state(first: CheckpointReader, second: CheckpointReader) -> None:
    assert first.names() == second.names()
    assert (first.step, first.optimizer_step()) == (second.step, second.optimizer_step())
    for name in first.names():
        for kind in KINDS:
            assert torch.equal(first.tensor(name, kind), second.tensor(name, kind)), (name, kind)
    ours, theirs = first.buffers(), second.buffers()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("pair", _each(PAIRS))
def test_a_run_that_moved_has_the_losses_of_one_that_stayed(pair, stayed, moved):
    assert moved(pair) == pytest.approx(stayed[pair[0]], abs=1e-5)
    assert stayed[pair[0]][-1] < stayed[pair[0]][0] - 0.05, "nothing was learned"


@pytest.mark.parametrize("pair", _each(BF16_PAIRS))
def test_bfloat16_goes_on_within_its_precision(pair, stayed, moved):
    assert moved(pair) == pytest.approx(stayed[pair[0]], abs=0.02)


@pytest.mark.parametrize("pair", _each([*PAIRS, *BF16_PAIRS]))
def test_masters_moments_step_and_codes_arrive_to_the_last_bit(pair, folder, moved):
    source, target = pair
    moved(pair)
    again = open_checkpoint(folder / "again" / f"{source}-to-{target}")
    assert again.layout["zero_stage"] == target.stage and again.layout["ep_size"] == target.ep
    assert_equal_state(open_checkpoint(folder / str(source)), again)
    assert again.counters["global_steps"] == SAVED_AT
    assert again.counters["global_samples"] == SAVED_AT * 8


# ------------------------------------------------------------------ against DeepSpeed's own load

SAME = [Layout(1, 2, 2), Layout(0, 2, 2, "bf16"), Layout(3, 2, 2, "bf16")]


def test_on_the_same_layout_it_is_what_deepspeed_restores_bit_for_bit(folder, stayed):
    native = run_ranks(2, load_natively, str(folder), [(str(layout), layout) for layout in SAME], 4)[0]
    ours = run_ranks(2, move, str(folder), [(str(layout), layout) for layout in SAME], 4)[0]
    assert ours == native


def _without_the_step(rank: int, world: int, folder: str, source: str, target: Layout, steps: int) -> list[float]:
    training = Training(folder, target, rank)
    training.restore(Path(folder) / source)
    for state in training.session.engine.optimizer.optimizer.state.values():
        state["step"].zero_()
    return training.train(steps)


def test_the_losses_would_show_a_lost_adam_step(folder, stayed):
    source = Layout(0, 1, 1)
    losses = run_ranks(1, _without_the_step, str(folder), str(source), Layout(3, 1, 1), 3)[0]
    assert abs(losses[1] - stayed[source][1]) > 1e-3


# ------------------------------------------------------------------ refusals


def _refused(rank: int, world: int, folder: str, source: str, changes: dict) -> str:
    training = Training(folder, Layout(2, 1, world), rank, **changes)
    training.restore(Path(folder) / source)
    return "restored"


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"moe.num_experts": 8}, r"\[4, 12, 16\] there, \[8, 12, 16\] here"),
        ({"moe.top_k": 0}, "is a parameter of the checkpoint, not of this run"),
        ({"codebook.num_codes": 16}, "buffer bank.codes_LKC"),
    ],
)
def test_another_model_is_refused_by_name(folder, stayed, changes, part):
    with pytest.raises(RankFailure, match=part):
        run_ranks(1, _refused, str(folder), str(Layout(1, 2, 2)), changes)


# ------------------------------------------------------------------ the whole matrix


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    return folder, _sources(folder, ALL, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ALL, ids=str)
def test_every_layout_from_every_other(target, everything):
    folder, stayed = everything
    pairs = [(source, target) for source in ALL]
    for pair, losses in _moved(folder, pairs, 20).items():
        assert losses == pytest.approx(stayed[pair[0]], abs=1e-5), f"{pair[0]} to {pair[1]}"

"""Ranks that share every sequence train the model of ranks that read different ones, on four real ranks.

The reference is sequence-parallel size 1 of the same launch, which ``tests/test_parity.py`` holds to a plain loop. All
read the same micro-batches: of size 1 every rank one, of size 2 two, of size 4 all four.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor

from tests.distributed import run_ranks
from tests.moe.test_router_parity import CASES as ROUTERS
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import LoadedConfig
from vqmoe_ds.config.routers import routers
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import MASKED, Batch, positions_in_documents
from vqmoe_ds.runtime.errors import ConfigError

WORLD, MICRO, LENGTH, VOCAB, BATCH, STEPS = 4, 2, 24, 64, 8, 20

VQ: dict[str, dict[str, Any]] = {
    "context, top-1": {"moe": {"top_k": 1}, "codebook": {"source": "context", "num_codes": 20, "context_window": 9}},
    "tokens, discrete only": {"moe": {"top_k": 0}, "codebook": {"source": "token_embedding"}},
    "positions": {"moe": {"top_k": 0}, "codebook": {"source": "position_embedding", "source_momentum": 0.9}},
    "layer state, top-1": {"moe": {"top_k": 1}, "codebook": {"source": "layer_state"}},
    "early block": {"moe": {"top_k": 0}, "codebook": {"source": "early_block"}, "model": {"layers": 3}},
    "the paper's input and rule": {
        "moe": {"top_k": 1, "code_blend": 1.0},
        "codebook": {
            **{"source": "layer_state", "normalize_source": False, "commitment_weight": 0.1},
            **{"learning": "gradient", "learning_rate": 0.01},
        },
    },
    "top-2 of normed heads, recomputed": {
        "moe": {"top_k": 2, "router": "topk"},
        "model": {"qk_norm": "heads"},
        "train": {"activation_checkpointing": True},
    },
    "dense": {"moe": {"router": "dense"}, "model": {"qk_norm": "full"}},
    "grouped queries": {"moe": {"top_k": 0}, "model": {"kv_heads": 2}},
    "sliding window": {"moe": {"top_k": 1}, "codebook": {"source": "context"}, "model": {"sliding_window": 5}},
    "documents kept apart": {
        "moe": {"top_k": 1},
        "codebook": {"source": "context", "num_codes": 20, "context_window": 9},
        "data": {"separate_documents": True},
    },
}


class Layout(NamedTuple):
    sp: int
    ep: int
    stage: int


REFERENCE = Layout(1, 1, 0)
FEW = {
    "context, top-1": [Layout(4, 2, 2), Layout(2, 2, 3)],
    "top-2 of normed heads, recomputed": [Layout(2, 4, 1)],
    "grouped queries": [Layout(2, 2, 2)],
    "sliding window": [Layout(2, 2, 3)],
    "documents kept apart": [Layout(4, 2, 2)],
}
MANY = {
    "context, top-1": [Layout(2, 1, 0), Layout(4, 4, 1), Layout(4, 1, 3)],
    "tokens, discrete only": [Layout(2, 4, 2), Layout(4, 2, 0)],
    "positions": [Layout(4, 1, 1)],
    "layer state, top-1": [Layout(2, 4, 1), Layout(4, 4, 3)],
    "early block": [Layout(4, 2, 2)],
    "the paper's input and rule": [Layout(2, 2, 0)],
    "top-2 of normed heads, recomputed": [Layout(4, 4, 2)],
    "dense": [Layout(2, 1, 3)],
    "grouped queries": [Layout(2, 4, 3)],
    "documents kept apart": [Layout(2, 4, 3), Layout(2, 1, 1)],
}
REFUSED = ["expert_choice", "adaptive_clustering of the batch", "softmoe", "softmoe_ac"]
OTHERS = sorted(set(ROUTERS) - set(REFUSED))
ROUTER_MATRIX = {case: [Layout(2 + 2 * (n % 2), 1 << n % 3, n % 4)] for n, case in enumerate(OTHERS)}


def _config(case: str, **train: Any) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": VOCAB, "layers": 2, "width": 32, "heads": 4, "sequence_length": LENGTH},
        "moe": {"num_experts": 8, "expert_hidden": 16, "balance_weight": 0.05, "z_loss_weight": 0.01},
        "codebook": {"init_step": 2, "kmeans_samples": 128, "dead_below": 0.2},
        "train": {"batch_size": BATCH, "steps": STEPS, "warmup_steps": 2, "grad_clip": 0.4},
        "data": {},
    }
    moe, options = ROUTERS.get(case, ({}, {}))
    for section, values in [*VQ.get(case, {}).items(), ("moe", moe), ("train", train)]:
        sections[section] = {**sections[section], **values}
    return RunConfig(**sections, router=options)


class Symbols:
    """Batches and held-out windows of a noisy counting machine, where some targets are masked."""

    masked, sequence_length = True, LENGTH

    def __init__(self, separate: bool = False) -> None:
        self.separate = separate

    def __len__(self) -> int:
        return 11

    def read(self, positions: np.ndarray) -> Batch:
        windows, masks = zip(*(self._window(int(position)) for position in positions), strict=True)
        tokens_BS = np.stack(windows)
        targets_BS = np.where(np.stack(masks), MASKED, tokens_BS[:, 1:])
        batch = Batch(tokens_BS[:, :-1], targets_BS, (targets_BS != MASKED).sum(axis=1) * 3)
        if not self.separate:
            return batch
        return batch._replace(positions_BS=positions_in_documents(np.roll(targets_BS == MASKED, 1, axis=1)))

    def micro_batches(self, first: int, rank: int, world: int, size: int) -> list[Batch]:
        starts = range(first + rank * size, first + BATCH, world * size)
        return [self.read(np.arange(start, start + size)) for start in starts]

    def epoch(self, samples: int) -> float:
        return 0.0

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(number)
        start, stride = random.integers(64), random.integers(1, 4)
        noise = random.random(LENGTH + 1) < 0.1
        starts = (random.random(LENGTH) < 0.1) | (np.arange(LENGTH) > LENGTH - number % 9)
        return (start + stride * np.arange(LENGTH + 1) + 17 * noise) % VOCAB, starts


class Report(NamedTuple):
    """What a training leaves behind."""

    losses: list[float]
    aux_losses: list[float]
    norms: list[float]
    tokens: list[int]
    bytes_per_token: float
    validation: tuple[float, float]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    in_step: bool
    rows: list[int]


def _engine_config(folder: Path, rank: int, config: RunConfig, layout: Layout) -> EngineConfig:
    values: dict[str, Any] = {
        "zero_optimization": {"stage": layout.stage},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "eps": 1e-6}},
        "train_micro_batch_size_per_gpu": MICRO,
    }
    path = folder / f"rank{rank}.json"
    path.write_text(json.dumps(values))
    train = config.train.model_copy(update={"sequence_parallel_size": layout.sp})
    loaded = LoadedConfig(config.model_copy(update={"train": train}), frozenset())
    return resolve(str(path), loaded, WORLD, layout.ep)


def _trainer(folder: Path, rank: int, config: RunConfig, layout: Layout) -> Any:
    from vqmoe_ds.runtime.ranks import Place
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer

    engine_config = _engine_config(folder, rank, config, layout)
    session = build_session(engine_config, Place(rank, WORLD, rank, WORLD), "test.json")
    return Trainer(session, Symbols(config.data.separate_documents), [])


def _report(trainer: Any, layout: Layout, steps: int) -> Report:
    import deepspeed

    from vqmoe_ds.evaluation.perplexity import validate

    session, results, norms = trainer.session, [], []
    for _ in range(steps):
        results.append(trainer.train_step())
        norms.append(float(session.engine.get_global_grad_norm()))
    model = session.model
    score = validate(session, Symbols(session.config.run.data.separate_documents))
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=layout.stage == 3):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = Report(
        [result.loss for result in results],
        [result.aux_loss for result in results],
        norms,
        [result.tokens for result in results],
        results[-1].bytes_per_token,
        (score.loss, score.bytes_per_token),
        weights,
        {name: value.clone() for name, value in model.named_buffers() if ".router." in name or "bank." in name},
        session.sync.in_step(),
        [int(session.sum_over_ranks(layer.tokens_per_expert).sum()) for layer in model.moe_layers()],
    )
    session.engine.destroy()
    return report


def _train(rank: int, world: int, folder: Path, jobs: list[tuple[RunConfig, Layout]]) -> list[Report]:
    return [_report(_trainer(folder, rank, *job), job[1], STEPS) for job in jobs]


def _furthest(got: dict[str, Tensor], want: dict[str, Tensor], rank: int, ep: int) -> float:
    """Largest difference of two sets of tensors, relative to the size of each."""
    assert got.keys() == want.keys()
    worst = 0.0
    for name, tensor in got.items():
        whole = want[name].chunk(ep)[rank % ep] if ".experts." in name else want[name]
        scale = max(1.0, float(whole.double().abs().max()))
        worst = max(worst, float((tensor.double() - whole.double()).abs().max()) / scale)
    return worst


def _compare(answers: list[list[Report]], jobs: list[tuple[RunConfig, Layout]]) -> None:
    reference = answers[0][0]
    assert max(reference.norms) > 0.4, "clipping never acted"
    assert reference.losses[-1] < reference.losses[0] - 0.1, "nothing was learned"
    for index, (_, layout) in enumerate(jobs):
        for rank, report in enumerate(answer[index] for answer in answers):
            assert report.losses == pytest.approx(reference.losses, abs=1e-5), layout
            assert report.aux_losses == pytest.approx(reference.aux_losses, abs=1e-5), layout
            assert report.norms == pytest.approx(reference.norms, rel=1e-4), layout
            assert report.tokens == reference.tokens == [BATCH * LENGTH] * STEPS
            assert report.bytes_per_token == reference.bytes_per_token == 3
            assert report.validation == pytest.approx(reference.validation, abs=1e-5), layout
            assert _furthest(report.weights, reference.weights, rank, layout.ep) < 3e-4, layout
            assert _furthest(report.state, reference.state, 0, 1) < 1e-5, layout
            assert report.in_step and report.rows == reference.rows, layout


def _check(folder: Path, matrix: dict[str, list[Layout]]) -> None:
    jobs = [(_config(case), layout) for case, layouts in matrix.items() for layout in (REFERENCE, *layouts)]
    answers = run_ranks(WORLD, _train, folder, jobs, timeout=500)
    start = 0
    for layouts in matrix.values():
        end = start + 1 + len(layouts)
        _compare([answer[start:end] for answer in answers], jobs[start:end])
        start = end


def test_a_shared_sequence_is_trained_as_a_whole_one(tmp_path: Path) -> None:
    _check(tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("matrix", [MANY, ROUTER_MATRIX], ids=["sources of codes", "other routers"])
def test_every_source_router_stage_and_ep_size(tmp_path: Path, matrix: dict[str, list[Layout]]) -> None:
    _check(tmp_path, matrix)


def test_every_registered_router_is_tried_or_refused() -> None:
    tried = {_config(case).moe.router for case in [*MANY, *OTHERS]}
    refused = {_config(case).moe.router for case in REFUSED}
    assert tried | refused >= set(routers())


# ------------------------------------------------------------------ resume


def _resume(rank: int, world: int, folder: Path, moves: list[tuple[Layout, Layout]], steps: int) -> list[list[float]]:
    """Losses of a run of whole sequences that nothing stopped, and of runs that were stopped and went on elsewhere."""
    from tests.checkpoint.layouts import save
    from vqmoe_ds.checkpoint.resume.session import check_fits, choose, consumed_samples, load

    config, found = _config("context, top-1"), []
    trainer = _trainer(folder, rank, config, REFERENCE)
    found.append([trainer.train_step().loss for _ in range(steps)])
    for number, (source, target) in enumerate(moves):
        trainer = _trainer(folder, rank, config, source)
        losses = [trainer.train_step().loss for _ in range(steps // 2)]
        save(trainer.session, folder / str(number), trainer.step, keep_last=1, samples=trainer.samples)
        trainer.session.engine.destroy()
        trainer = _trainer(folder, rank, config, target)
        tag, _ = choose(folder / str(number), "auto", rank)
        check_fits(trainer.session.config, tag)
        trainer.step = load(trainer.session, tag)
        trainer.resumed_at = trainer.step, consumed_samples(tag)
        found.append(losses + [trainer.train_step().loss for _ in range(steps - steps // 2)])
        trainer.session.engine.destroy()
    return found


def test_a_run_goes_on_with_sequences_shared_by_any_number_of_ranks(tmp_path: Path) -> None:
    moves = [
        (Layout(2, 2, 2), Layout(1, 4, 2)),
        (Layout(1, 2, 1), Layout(2, 2, 1)),
        (Layout(4, 1, 2), Layout(2, 4, 0)),
    ]
    stayed, *moved = run_ranks(WORLD, _resume, tmp_path, moves, 10, timeout=120)[0]
    assert stayed[-1] < stayed[0] - 0.1, "nothing was learned"
    for losses in moved:
        assert losses == pytest.approx(stayed, abs=1e-5)


# ------------------------------------------------------------------ refusals


def test_batches_are_dealt_out_to_groups_of_ranks(tmp_path: Path) -> None:
    config = _engine_config(tmp_path, 0, _config("context, top-1"), Layout(2, 4, 2))
    assert (config.readers, config.micro_batch, config.accumulation_steps) == (2, MICRO, 2)
    assert config.deepspeed["sequence_parallel_size"] == 2
    whole = _engine_config(tmp_path, 0, _config("context, top-1"), REFERENCE)
    assert (whole.readers, whole.micro_batch, whole.accumulation_steps) == (4, MICRO, 1)
    assert "sequence_parallel_size" not in whole.deepspeed


@pytest.mark.parametrize(
    ("case", "changes", "size", "sentence"),
    [
        ("context, top-1", {}, 3, "sequence-parallel size 3 does not divide the 4 ranks of this run"),
        ("context, top-1", {"model": {"heads": 2}}, 4, "sequence-parallel size 4 does not divide model.heads=2"),
        ("grouped queries", {}, 4, "sequence-parallel size 4 does not divide model.kv_heads=2"),
        ("context, top-1", {"model": {"sequence_length": 30}}, 4, "does not divide model.sequence_length=30"),
        ("context, top-1", {"train": {"batch_size": 6}}, 2, "x 2 groups of 2 ranks that share sequences"),
        (
            "layer state, top-1",
            {"model": {"image_size": 8, "sequence_length": 4}},
            2,
            "leave --sp_size out to train on",
        ),
        (REFUSED[0], {}, 2, "but moe.router=expert_choice lets experts choose among all tokens of a sequence"),
        (REFUSED[1], {}, 2, "but router.statistics=batch looks at all tokens of a batch"),
        (REFUSED[2], {}, 2, "but moe.router=softmoe mixes all tokens of a sequence"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, case, changes, size, sentence):
    config = _config(case)
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        _engine_config(tmp_path, 0, config.model_copy(update=sections), Layout(size, 1, 2))


def test_the_size_is_given_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"sequence_parallel_size": 2}))
    config = _config("context, top-1")
    assert resolve(str(path), LoadedConfig(config, frozenset()), WORLD).sp_size == 2
    given = LoadedConfig(config, frozenset({"train.sequence_parallel_size"}))
    with pytest.raises(ConfigError, match="train.sequence_parallel_size=1 contradicts sequence_parallel_size=2"):
        resolve(str(path), given, WORLD)

"""Images on real ranks: every layout learns the same, and a resumed run goes on to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.layouts import Layout
from tests.distributed import run_ranks
from tests.images import CLASSES, squares
from tests.models.test_vision import SMALL

ONE = Layout(0, 1, 1)
LAYOUTS = {2: [Layout(1, 2, 2)], 4: [Layout(2, 2, 4), Layout(3, 4, 4)]}
STEPS, MORE = 4, 3
CASES: list[dict[str, Any]] = [
    {"codebook.source": "position_embedding", "codebook.num_codes": 6, "codebook.kmeans_samples": 64},
    {"moe.router": "expert_choice", "moe.top_k": 2, "data.augment": "rand", "data.mixup": 0.2, "data.cutmix": 0.5},
    {"moe.router": "softmoe_ac"},  # its first layer is softmoe
]


class Training:
    """A session on images, and its loop."""

    def __init__(self, folder: Path, layout: Layout, rank: int, changes: dict[str, Any]) -> None:
        from vqmoe_ds.config.deepspeed_json import resolve
        from vqmoe_ds.config.load import load_config
        from vqmoe_ds.data.image_augment import Mixing
        from vqmoe_ds.data.images import ImageBatches, ImageSet
        from vqmoe_ds.runtime.ranks import Place
        from vqmoe_ds.train.engine import build_session
        from vqmoe_ds.train.loop import Trainer

        path = folder / f"deepspeed-{rank}.json"
        path.write_text(json.dumps(layout.deepspeed()))
        numbers = {"train.batch_size": 16, "train.warmup_steps": 0, "train.learning_rate": 0.01, "train.steps": 20}
        loaded = load_config("vit-cifar", None, {**SMALL, **numbers, **changes})
        config = resolve(str(path), loaded, layout.world, layout.ep)
        self.session = build_session(config, Place(rank, layout.world, rank, layout.world), str(path))
        self.images = ImageSet(*squares(40), np.arange(40), CLASSES, config.run.model.sequence_length)
        train, data = config.run.train, config.run.data
        mixing = Mixing(data.mixup, data.cutmix, len(CLASSES)) if data.mixup else None
        batches = ImageBatches(self.images, train.batch_size, train.seed, data.augment, mixing)
        self.trainer = Trainer(self.session, batches, [])

    def train(self, steps: int) -> list[float]:
        results = [self.trainer.train_step() for _ in range(steps)]
        assert all(result.taken for result in results)
        assert results[0].tokens == 16 * 16
        return [result.loss for result in results]

    def score(self) -> tuple[float, list[int]]:
        from vqmoe_ds.evaluation.classification import classify

        score = classify(self.session, self.images)
        return score.loss, score.predictions_T.tolist()

    def save(self, folder: Path) -> Path:
        from tests.checkpoint.layouts import save

        return save(self.session, folder, self.trainer.step, 0, self.trainer.samples)

    def resume(self, tag: Path) -> None:
        from vqmoe_ds.checkpoint.resume.session import consumed_samples, load

        self.trainer.step = load(self.session, tag)
        self.trainer.resumed_at = (self.trainer.step, consumed_samples(tag))


def _train(rank: int, world: int, folder: str, layouts: list[Layout]) -> dict[tuple[int, Layout], Any]:
    """Losses, scores and the checkpoint after ``STEPS``, by case and layout; then losses of a run that goes on."""
    found = {}
    for case, changes in enumerate(CASES):
        for layout in layouts:
            training = Training(Path(folder), layout, rank, changes)
            losses = training.train(STEPS)
            tag = training.save(Path(folder) / f"{case}-{layout}")
            score = training.score()
            found[case, layout] = losses + training.train(MORE), score, str(tag)
            training.session.engine.destroy()
    return found


def _go_on(rank: int, world: int, folder: str, jobs: list[tuple[int, Layout, str]]) -> list[list[float]]:
    losses = []
    for case, layout, tag in jobs:
        training = Training(Path(folder), layout, rank, CASES[case])
        training.resume(Path(tag))
        losses.append(training.train(MORE))
        training.session.engine.destroy()
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[tuple[int, Layout], Any]]:
    folder, found = tmp_path_factory.mktemp("images"), {}
    for world, layouts in ({1: [ONE]} | LAYOUTS).items():
        found |= run_ranks(world, _train, str(folder), layouts)[0]
    return folder, found


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_layout_learns_the_same(case, trained):
    _, found = trained
    losses, (loss, predictions), _ = found[case, ONE]
    assert losses[-1] < losses[0]
    for layouts in LAYOUTS.values():
        for layout in layouts:
            theirs, (their_loss, their_predictions), _ = found[case, layout]
            assert theirs == pytest.approx(losses, abs=1e-5), layout
            assert their_loss == pytest.approx(loss, abs=1e-5), layout
            assert their_predictions == predictions, layout


def test_a_resumed_run_goes_on_to_the_bit_and_on_other_layouts_alike(trained):
    folder, found = trained
    spread = Layout(3, 4, 4)
    jobs = [(0, spread, found[0, spread][2]), (1, spread, found[1, spread][2]), (0, spread, found[0, ONE][2])]
    same, choice, moved = run_ranks(4, _go_on, str(folder), jobs)[0]
    assert same == found[0, spread][0][STEPS:]
    assert choice == found[1, spread][0][STEPS:]
    assert moved == pytest.approx(found[0, ONE][0][STEPS:], abs=1e-5)
    (alone, back) = run_ranks(1, _go_on, str(folder), [(0, ONE, found[0, ONE][2]), (0, ONE, found[0, spread][2])])[0]
    assert alone == found[0, ONE][0][STEPS:]
    assert back == pytest.approx(alone, abs=1e-5)


def test_a_checkpoint_scores_alike_outside_of_training(trained):
    from vqmoe_ds.checkpoint.load_model import load_model
    from vqmoe_ds.evaluation.classification import Scoring
    from vqmoe_ds.runtime.errors import CheckpointError

    _, found = trained
    _, (loss, predictions), tag = found[0, Layout(2, 2, 4)]
    with pytest.raises(CheckpointError, match=r"needs a model of text, and .* classifies images"):
        load_model(tag)
    loaded = load_model(tag, images=True)
    from vqmoe_ds.data.images import ImageSet

    images = ImageSet(*squares(40), np.arange(40), CLASSES, 16)
    score = Scoring(loaded.model, loaded.device, 7, 0, 1, torch.clone)(images, np.arange(40), lambda: None)
    assert score.loss == pytest.approx(loss, abs=1e-5)
    assert score.predictions_T.tolist() == predictions

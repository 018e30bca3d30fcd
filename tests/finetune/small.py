"""Tiny models of every kind, pretrained for a step, and a fine-tuning of them on random texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.checkpoint.layouts import MODEL, Layout
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import LoadedConfig
from vqmoe_ds.data.labelled_batches import LabelledBatches, LabelledTexts

CLASSES = ("no", "perhaps", "yes")
VOCAB = int(MODEL["model.vocab_size"])
FIXED_BS = torch.arange(32).view(2, 16) * 7 % VOCAB
"""Tokens whose codes are looked at."""


def texts(count: int = 40, seed: int = 0, longest: int = 16) -> LabelledTexts:
    """Texts whose class shows in their tokens."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    ids = [rng.integers(20 * label, 20 * label + 20, rng.integers(2, longest + 1)) for label in labels]
    return LabelledTexts([f"text {n}" for n in range(count)], ids, labels, CLASSES, np.zeros(count, bool))


def finetune_config(reader: CheckpointReader, task: str = "sst2", **changes: Any) -> LoadedConfig:
    """As ``finetune.config`` makes it, of a classifier over random texts or of a language model."""
    from vqmoe_ds.finetune.cli import LANGUAGE_MODEL, build_parser
    from vqmoe_ds.finetune.config import classifier_config, language_model_config, starting_config

    settings = {
        "train.batch_size": 8,
        "train.steps": 20,
        "train.learning_rate": 0.01,
        "train.warmup_steps": 0,
        **changes,
    }
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    command = ["--checkpoint", str(reader.path), "--task", task, *sets]
    loaded = starting_config(build_parser("", "").parse_args(command), reader)
    return language_model_config(loaded, None) if task == LANGUAGE_MODEL else classifier_config(loaded, CLASSES, 40)


class Finetuning:
    """A session that starts from a checkpoint, and its loop."""

    def __init__(self, folder: Path, layout: Layout, rank: int, source: Path, **changes: Any) -> None:
        from vqmoe_ds.finetune.run import begin
        from vqmoe_ds.runtime.ranks import Place
        from vqmoe_ds.train.engine import build_session
        from vqmoe_ds.train.loop import Trainer

        path = folder / f"deepspeed-{rank}.json"
        path.write_text(json.dumps(layout.deepspeed()))
        self.reader = open_checkpoint(source)
        config = resolve(str(path), finetune_config(self.reader, **changes), layout.world, layout.ep)
        self.session = build_session(config, Place(rank, layout.world, rank, layout.world), str(path))
        begin(self.session, self.reader)
        seed = config.run.train.seed
        self.trainer = Trainer(self.session, LabelledBatches(texts(), config.run.train.batch_size, seed), [])

    def train(self, steps: int) -> list[float]:
        results = [self.trainer.train_step() for _ in range(steps)]
        assert all(result.taken for result in results)
        return [result.loss for result in results]

    def save(self, folder: Path) -> CheckpointReader:
        from tests.checkpoint.layouts import save

        return open_checkpoint(save(self.session, folder, self.trainer.step, 0, self.trainer.samples))

    def resume(self, tag: Path) -> None:
        from vqmoe_ds.checkpoint.resume.session import consumed_samples, load

        self.trainer.step = load(self.session, tag)
        self.trainer.resumed_at = (self.trainer.step, consumed_samples(tag))

    def codes(self) -> Tensor:
        """Codes of the fixed tokens in all layers, for sources that look at embeddings."""
        from vqmoe_ds.train.loop import full_embedding

        model = self.session.model
        assert model.source is not None and model.bank is not None
        embedded_BSD = torch.nn.functional.embedding(FIXED_BS, full_embedding(self.session))
        source_BSD = model.source(FIXED_BS, embedded_BSD)
        return model.bank.lookup_all(model.bank.prepare(source_BSD.flatten(0, 1)))


def tensors(reader: CheckpointReader) -> dict[str, Tensor]:
    return {name: reader.tensor(name) for name in reader.names()}

"""What a fine-tuning learns: labelled texts or plain text, behind one interface."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Protocol

from vqmoe_ds.config.load import LoadedConfig
from vqmoe_ds.finetune.cli import LANGUAGE_MODEL

if TYPE_CHECKING:
    from vqmoe_ds.checkpoint.reader import CheckpointReader
    from vqmoe_ds.data.batches import Batches, Windows
    from vqmoe_ds.train.callbacks import Callback, MetricsFile
    from vqmoe_ds.train.job import Job


class Task(Protocol):
    """The thing to learn: labelled texts or plain text."""

    def configure(self, loaded: LoadedConfig) -> LoadedConfig:
        """The configuration of one run with what follows from its data."""

    def describe(self, run: Any) -> list[str]:
        """Lines for the user."""

    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of all that is read, by name."""

    def open(self, job: Job) -> tuple[Batches, Windows]:
        """Training batches of one run, and texts for the routing probe; all ranks call it together."""

    def callbacks(self, job: Job, file: MetricsFile, health: Any) -> tuple[Callback, Callback]:
        """(interim validation, final report) of the run opened last."""


def open_task(args: argparse.Namespace, reader: CheckpointReader, loaded: LoadedConfig) -> Task:
    """The task that ``--task`` names, its data read and checked.

    Raises:
        CheckpointError: the checkpoint has no tokenizer, or another one than the data.
        DataError: the data cannot be used.
    """
    # Imported here: run.py imports this module before it has checked the command line, and these bring torch.
    from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
    from vqmoe_ds.checkpoint.load_model import require_tokenizer

    run, source = loaded.config, run_config(reader.config, reader.path)
    if args.task == LANGUAGE_MODEL:
        from vqmoe_ds.finetune.language import open_text

        return open_text(loaded, source, reader)
    from vqmoe_ds.finetune.classification import ClassificationTask, open_texts

    tokenizer = require_tokenizer(reader, source, args.tokenizer)
    return ClassificationTask(open_texts(run.finetune, tokenizer, run.model.sequence_length))

"""Fine-tuning of a language model on plain text of another domain."""

from __future__ import annotations

from typing import Any

from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.config.load import LoadedConfig
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.at_start import check_at_start
from vqmoe_ds.data.batches import Batches, Windows
from vqmoe_ds.data.fingerprint import of_data
from vqmoe_ds.data.indexed import UNKNOWN, open_indexed_text
from vqmoe_ds.data.raw_text import RawText, open_raw_text
from vqmoe_ds.data.tokenizers import ByteTokenizer, are_bytes, nothing_known
from vqmoe_ds.data.training_data import TrainingData
from vqmoe_ds.evaluation.perplexity import validate
from vqmoe_ds.evaluation.routing import RoutingHealth
from vqmoe_ds.finetune.callbacks import BestReport
from vqmoe_ds.finetune.config import language_model_config
from vqmoe_ds.models.session import Session
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.train.callbacks import MetricsFile, Validation
from vqmoe_ds.train.job import Job
from vqmoe_ds.train.loop import Callback
from vqmoe_ds.train.run_folder import index_folder


class TextTask:
    """Plain text as a ``Task`` of the launcher."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data
        self._windows: Windows | None = None

    def configure(self, loaded: LoadedConfig) -> LoadedConfig:
        return language_model_config(loaded, self.data.tokenizer_sha256)

    def describe(self, run: RunConfig) -> list[str]:
        return [f"data: {self.data.summary()}"]

    def fingerprint(self) -> dict[str, str]:
        return of_data(self.data)

    def open(self, job: Job) -> tuple[Batches, Windows]:
        cache = index_folder(job.config, job.run_dir)
        if not isinstance(self.data, RawText):
            cache.mkdir(parents=True, exist_ok=True)
        batches, self._windows = self.data.open(job.config.run, cache)
        return batches, self._windows

    def callbacks(self, job: Job, file: MetricsFile, health: RoutingHealth) -> tuple[Callback, Callback]:
        windows = self._windows
        assert windows is not None
        validation = Validation(
            job.console, file, lambda session, most: validate(session, windows, most * session.round_size), True
        )

        def finish(session: Session) -> tuple[dict[str, Any], str]:
            score = validate(session, windows)
            return dict(score.row()), f"validation {score} on all {len(windows)} held-out windows"

        facts = {"task": "lm", "data": job.config.run.data.path}
        return validation, BestReport(job, file, health, finish, facts, "token")


def open_text(loaded: LoadedConfig, source: RunConfig, reader: CheckpointReader) -> TextTask:
    """The text that ``--data`` names, as windows of the pretrained model's context.

    Raises:
        CheckpointError: its ids are of another tokenizer than the model's.
        DataError: as in pretraining.
    """
    check_at_start(loaded.config, prepares=False)
    data: TrainingData = open_indexed_text(loaded.config) or open_raw_text(loaded.config)
    _check_tokenizer(data, source, reader)
    return TextTask(data)


def _check_tokenizer(data: TrainingData, source: RunConfig, reader: CheckpointReader) -> None:
    """Refuse text of another tokenizer; raw text and prepared bytes differ only in the id that ends a document."""
    bytes_ = (None, ByteTokenizer.checksum)
    ours, theirs, size = data.tokenizer_sha256, source.data.tokenizer_sha256, source.model.vocab_size
    both_bytes = ours in bytes_ and are_bytes(theirs, size)
    fits = (data.vocab_size or size) <= size
    # Not raw text (None): its bytes are surely no ids of a model that is not of bytes.
    open_ = ours is not None and nothing_known(theirs, size)
    if not fits or (ours != theirs and not both_bytes and not open_):
        raise CheckpointError(
            f"{reader.path} was trained on {_ids(theirs, size)}, the text of --data is {_ids(ours, data.vocab_size)}; "
            "prepare it with the model's tokenizer (tools/prepare_data.py), or take another checkpoint"
        )


def _ids(checksum: str | None, vocab_size: int | None) -> str:
    if checksum in (None, UNKNOWN):
        what = "raw bytes" if are_bytes(checksum, vocab_size or 0) else "ids of an unknown tokenizer"
    else:
        what = f"ids of the tokenizer {str(checksum)[:12]}"
    return f"{what} (vocabulary {vocab_size or 'unknown'})"

"""One face for every kind of checkpoint: whole tensors by name, whatever layout wrote them.

A parameter is a row of pieces: stretches of its flattened values, each lying somewhere in a file. Every layout
comes down to that, so any stretch can be read on its own and no reader holds more than it is asked for.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.io.archive import Stored
from vqmoe_ds.checkpoint.resume.store import MANIFEST, find_newest, read_manifest
from vqmoe_ds.runtime.errors import CheckpointError, UserError, one_line, shown
from vqmoe_ds.runtime.files import why_missing

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
CHUNK = 1 << 20
"""Values that ``stream`` reads at a time (4 MiB of float32)."""


class Piece(NamedTuple):
    """``length`` values of a parameter from ``start`` on (in the flattened whole), at ``begin`` in ``stored``."""

    start: int
    length: int
    stored: Stored
    begin: int


@contextmanager
def sound(path: str | Path) -> Iterator[None]:
    """Inside, whatever the content of a checkpoint brings about is one sentence.

    Its files name each other, count each other's tensors and nest as they please: what they may say is without end.

    Raises:
        CheckpointError: instead of a ``KeyError``, a ``TypeError``, …
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(str(error).partition(chr(10))[0], 200)}"
        raise CheckpointError(
            f"{path} is damaged, or not laid out as its kind is ({reason}); copy it again, or take another checkpoint"
        ) from error


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def inside(self: CheckpointReader, *args: Any, **options: Any) -> Any:
        with sound(self.path):
            return method(self, *args, **options)

    return inside


class CheckpointReader(ABC):
    """A checkpoint as whole tensors; nothing but small metadata is read before a tensor is asked for.

    Attributes:
        path: folder of the checkpoint.
        kind: ``deepspeed`` or ``portable``.
        step: optimizer steps of the run that wrote it.
        config: run configuration as saved.
        layout: world size, expert-parallel size, ZeRO stage and precision that wrote it.
        client_state: what the trainer saved beside DeepSpeed's own state.
        counters: DeepSpeed's ``global_steps``, ``global_samples``, ``skipped_steps``, ``lr_scheduler``, and the options
            of its optimizer under ``adam``; empty where they are not known.
    """

    def __init_subclass__(cls) -> None:
        """What reads later than ``open_checkpoint`` meets the same damage."""
        for name in {"buffers", "pieces", "read"} & vars(cls).keys():
            setattr(cls, name, _guarded(vars(cls)[name]))

    path: Path
    kind: str
    step: int
    config: dict[str, Any]
    layout: dict[str, Any]
    client_state: dict[str, Any]
    counters: dict[str, Any]

    @property
    def samples(self) -> int:
        """Training samples consumed: where the data goes on."""
        saved = self.client_state.get("vqmoe_ds", {})
        return int(saved.get("samples", self.step * self.config.get("train", {}).get("batch_size", 0)))

    frozen: frozenset[str] = frozenset()
    """Parameters that did not learn, which have no moments."""

    _shapes: dict[str, tuple[int, ...]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter; experts are stacked over all global experts, ``[N, H, D]``."""
        return self._shapes

    @property
    @abstractmethod
    def has_optimizer(self) -> bool:
        """Whether Adam's moments are there."""

    @abstractmethod
    def optimizer_step(self) -> int:
        """Adam's own count of steps (its bias correction); 0 without an optimizer."""

    @abstractmethod
    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers of the model: codebooks, code map, averaged embeddings."""

    @abstractmethod
    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        """Where the values of a parameter lie, in order and without a gap.

        Raises:
            CheckpointError: a shard is missing, or there is no such tensor.
        """

    def names_of(self, kind: str) -> list[str]:
        """Parameters of which there are values of a kind (``KINDS``)."""
        return [name for name in self.names() if kind == "fp32" or name not in self.frozen]

    def names(self) -> list[str]:
        """Parameters in the order of ``MoETransformer.named_parameters()``."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """``count`` values of a flattened tensor from ``start`` on, float32; reads only these.

        Args:
            kind: ``fp32`` (the master weights), ``exp_avg`` or ``exp_avg_sq``.
        """
        out = torch.empty(count)
        for piece in self.pieces(name, kind):
            first, last = max(start, piece.start), min(start + count, piece.start + piece.length)
            if first < last:
                values = piece.stored.read(piece.begin + first - piece.start, last - first)
                if len(values) == count and values.dtype == out.dtype:
                    return values
                out[first - start : last - start].copy_(values)
        return out

    def tensor(self, name: str, kind: str = "fp32") -> Tensor:
        """A whole tensor, float32."""
        shape = self.shape(name)
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def stream(self, name: str, kind: str = "fp32") -> Iterator[Tensor]:
        """A tensor's values in order, flat float32, a few megabytes at a time."""
        total = math.prod(self.shape(name))
        for start in range(0, total, CHUNK):
            yield self.read(name, kind, start, min(CHUNK, total - start))


class WeightsReader(CheckpointReader):
    """A checkpoint of weights and buffers alone."""

    def __init__(self) -> None:
        self.layout, self.client_state, self.counters = {}, {}, {}

    @property
    def has_optimizer(self) -> bool:
        return False

    def optimizer_step(self) -> int:
        return 0


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Recognise and open a tag folder, a portable, Hugging Face, Megatron or native one, or a run folder.

    Of a run folder it is the newest tag that verifies.

    Raises:
        CheckpointError: nothing there, damaged, of a newer format, or of a kind that is not known.
    """
    path = Path(path)
    if not os.path.isdir(path):
        if os.path.lexists(path):
            what = "is a file" if os.path.isfile(path) else why_missing(path)
            raise CheckpointError(f"{path} {what}; give a run folder, or the folder of a checkpoint")
        raise CheckpointError(f"{path}: no such checkpoint folder")
    with sound(path):
        reader = _open(path)
        check_described(reader.config, reader.shapes, reader.path)
        _ = reader.samples, reader.has_optimizer, reader.optimizer_step()
    return reader


def check_described(config: dict[str, Any], tensors: Sized, path: Path) -> None:
    """Refuse a configuration that is none, or of more blocks than there are tensors, before loops run over it.

    Raises:
        CheckpointError: it is.
    """
    wrong = [name for name, section in config.items() if not isinstance(section, dict) and name != "native"]
    classes = config.get("finetune", {}).get("classes", ()) if not wrong else ()
    if wrong or not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(
            f"{path} has a run configuration that cannot be: {', '.join(wrong) or 'finetune.classes'}"
        )
    layers = config.get("model", {}).get("layers", 0)
    if not isinstance(layers, int) or layers > len(tensors):
        raise CheckpointError(
            f"{path} has a run configuration that cannot be: model.layers={shown(layers)}, and {len(tensors)} tensors"
        )


def _open(path: Path) -> CheckpointReader:
    from vqmoe_ds.checkpoint.formats.deepspeed.reader import TagReader
    from vqmoe_ds.checkpoint.formats.portable import STATE, PortableReader

    if not (path / MANIFEST).exists():
        if (path / "config.json").exists():
            from vqmoe_ds.checkpoint.formats.huggingface.folder import open_hf

            return open_hf(path)
        foreign = _open_foreign(path)
        if foreign is not None:
            return foreign
        path = _newest_under(path)
    manifest = read_manifest(path)
    for key in ("step", "layout", "config", "files"):
        if key not in manifest:
            raise CheckpointError(f"{path / MANIFEST} says nothing of {key}: it is not a manifest of this trainer")
    for name, expected in manifest["files"].items():
        check_inside(path, name)
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != expected["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {expected['bytes']}"
            raise CheckpointError(f"{path}: {name} {state}; copy it again, or take an earlier checkpoint")
    if (path / STATE).exists():
        return PortableReader(path, manifest)
    if not any(path.glob("*_states.pt")):
        raise CheckpointError(f"{path} holds neither a DeepSpeed checkpoint nor a portable one")
    return TagReader(path, manifest)


def require_language_model(reader: CheckpointReader, purpose: str) -> None:
    """Refuse a classifier.

    Args:
        purpose: what needs a language model, as the subject of a sentence.

    Raises:
        CheckpointError: it is one.
    """
    if classes_of(reader):
        raise CheckpointError(
            f"{purpose} needs a language model, and {reader.path} is {describe_classes(reader)}; "
            "give the checkpoint it was made from"
        )


def classes_of(reader: CheckpointReader) -> list[str]:
    """The classes of a classifier; none of a language model."""
    return list(reader.config.get("finetune", {}).get("classes", ()))


def describe_classes(reader: CheckpointReader) -> str:
    """Number and first names of a classifier's classes."""
    classes = classes_of(reader)
    return f"a classifier of {len(classes)} classes ({', '.join(classes[:5])}{', …' if len(classes) > 5 else ''})"


def _open_foreign(path: Path) -> CheckpointReader | None:
    """A Megatron checkpoint or one of native DeepSpeed-MoE layers, which have no manifest."""
    from vqmoe_ds.checkpoint.formats.megatron.folder import megatron_folder, open_megatron
    from vqmoe_ds.checkpoint.formats.native_moe.reader import native_folder, open_native

    if megatron_folder(path) is not None:
        return open_megatron(path)
    return open_native(path) if native_folder(path) is not None else None


def _newest_under(path: Path) -> Path:
    reasons: list[str] = []
    for folder in (path, path / "checkpoints"):
        found = find_newest(folder)
        if found.path is not None:
            return found.path
        reasons += found.passed_over
    if reasons:
        raise CheckpointError(f"{path} holds no checkpoint that verifies; the newest: {reasons[0]}")
    raise CheckpointError(
        f"{path} holds no finished checkpoint of this trainer: give a folder global_step… or the run folder above it"
    )


def check_inside(folder: Path, name: str) -> None:
    """Refuse a file name, read from an index, that leads out of its folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{folder} is refused: its index names {name!r}, which lies outside the folder")

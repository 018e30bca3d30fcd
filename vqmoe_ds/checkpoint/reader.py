"""Base class of every kind of checkpoint: whole tensors by name, whatever layout wrote them.

A parameter is a row of pieces: stretches of its flattened values, each lying somewhere in a file. Every layout
comes down to that, so any stretch can be read on its own and no reader holds more than it is asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.io.archive import Stored
from vqmoe_ds.runtime.errors import CheckpointError, UserError, one_line, shown

MOMENTS = ("exp_avg", "exp_avg_sq")
# fp32 first: convert.check_complete takes the first alone where there is no optimizer.
KINDS = ("fp32", *MOMENTS)
CHUNK = 1 << 20
"""Values that ``stream`` and ``fill`` read at a time (4 MiB of float32)."""


class Piece(NamedTuple):
    """``length`` values of a parameter from ``start`` on (in the flattened whole), at ``begin`` in ``stored``."""

    start: int
    length: int
    stored: Stored
    begin: int


def check_covered(path: Path, what: str, pieces: Iterable[Piece], total: int) -> None:
    """Refuse pieces that do not follow each other from the first value to the last, or reach past their files.

    A tensor that is read begins with ``torch.empty``: a gap would come out as whatever the memory held.

    Raises:
        CheckpointError: they do not.
    """
    reached = 0
    for piece in pieces:
        if piece.start != reached or piece.begin + piece.length > piece.stored.numel:
            break
        reached += piece.length
    else:
        if reached == total:
            return
    raise CheckpointError(
        f"{path}: {what} is there up to value {reached} of {total}; a shard is missing or is of another layout"
    )


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
        """Guard the methods that read later than ``open_checkpoint``: they meet the same damage."""
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
        """True if Adam's moments are there."""

    @abstractmethod
    def optimizer_step(self) -> int:
        """Adam's own count of steps (its bias correction); 0 without an optimizer."""

    @abstractmethod
    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers of the model: codebooks, code map, averaged embeddings."""

    @abstractmethod
    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        """Pieces of a parameter in the files, in order and without a gap.

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
        # Not zeros: the pieces leave no gap.
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

    def stream(self, name: str, kind: str = "fp32", start: int = 0, count: int | None = None) -> Iterator[Tensor]:
        """``count`` values from ``start`` on, by default all, in order, flat float32, a few megabytes at a time."""
        end = math.prod(self.shape(name)) if count is None else start + count
        for first in range(start, end, CHUNK):
            yield self.read(name, kind, first, min(CHUNK, end - first))

    def fill(self, flat: Tensor, name: str, kind: str = "fp32", start: int = 0) -> None:
        """Fill a flat tensor of any type with the values from ``start`` on, a few megabytes at a time."""
        for done in range(0, len(flat), CHUNK):
            part = flat[done : done + CHUNK]
            part.copy_(self.read(name, kind, start + done, len(part)))


class Format(NamedTuple):
    """A kind of checkpoint that ``open_checkpoint`` knows.

    Attributes:
        recognises: whether a folder holds one; reads little.
        open: the reader of such a folder; of a sealed one, given its manifest as well.
        sealed: it has a manifest of this trainer.
    """

    recognises: Callable[[Path], bool]
    open: Callable[..., CheckpointReader]
    sealed: bool


FORMATS: dict[str, Format] = {}
"""By ``CheckpointReader.kind``; every module of ``formats`` that reads a format enters it here."""


def register_format(
    kind: str, recognises: Callable[[Path], bool], open: Callable[..., CheckpointReader], sealed: bool = False
) -> None:
    """Let ``open_checkpoint`` know a format; see ``Format``."""
    FORMATS[kind] = Format(recognises, open, sealed)


class WeightsReader(CheckpointReader):
    """A checkpoint of weights and buffers alone."""

    def __init__(self) -> None:
        self.layout, self.client_state, self.counters = {}, {}, {}

    @property
    def has_optimizer(self) -> bool:
        return False

    def optimizer_step(self) -> int:
        return 0


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


def require_language_model(reader: CheckpointReader, purpose: str) -> None:
    """Refuse a classifier of texts or images.

    Args:
        purpose: what needs a language model, as the subject of a sentence.

    Raises:
        CheckpointError: it is one.
    """
    require_text(reader, purpose)
    if classes_of(reader):
        raise CheckpointError(
            f"{purpose} needs a language model, and {reader.path} is {describe_classes(reader)}; "
            "give the checkpoint it was made from"
        )


def require_text(reader: CheckpointReader, purpose: str) -> None:
    """Refuse a classifier of images.

    Args:
        purpose: what needs a model of text, as the subject of a sentence.

    Raises:
        CheckpointError: it is one.
    """
    if of_images(reader.config):
        raise CheckpointError(
            f"{purpose} needs a model of text, and {reader.path} classifies images; launchers/evaluate.py scores it"
        )


def of_images(config: dict[str, Any]) -> bool:
    """Whether a run configuration as saved is of a classifier of images."""
    return bool(config.get("model", {}).get("image_size", 0))


def classes_of(reader: CheckpointReader) -> list[str]:
    """The classes of a classifier; none of a language model."""
    section = "data" if of_images(reader.config) else "finetune"
    return list(reader.config.get(section, {}).get("classes", ()))


def describe_classes(reader: CheckpointReader) -> str:
    """Number and first names of a classifier's classes."""
    classes, things = classes_of(reader), "images in " if of_images(reader.config) else ""
    return (
        f"a classifier of {things}{len(classes)} classes ({', '.join(classes[:5])}{', …' if len(classes) > 5 else ''})"
    )

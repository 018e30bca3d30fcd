"""DeepSpeed's own loading without its pickles.

DeepSpeed reads checkpoints by ``torch.load(..., weights_only=False)``, which runs whatever a file says: in its
checkpoint engines and in a dozen of other places. PyTorch has one switch over all of them. While it is on, each
``torch.load`` of the process knows tensors, plain containers, and the few names below that DeepSpeed's files need, each
with no more attributes than DeepSpeed gives it.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vqmoe_ds.checkpoint.io.archive import ZERO_STAGES
from vqmoe_ds.runtime.errors import CheckpointError, UserError

_SWITCH, _OPPOSITE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def without_pickles() -> Iterator[None]:
    """Inside, no ``torch.load`` of this process executes anything, whatever its caller asks for.

    Raises:
        CheckpointError: a file asked for what no checkpoint needs; nothing of it was executed.
    """
    # PyTorch refuses every load while both are set.
    before = {name: os.environ.pop(name, None) for name in (_SWITCH, _OPPOSITE)}
    os.environ[_SWITCH] = "1"
    try:
        with torch.serialization.safe_globals(_names()):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the checkpoint is refused: a pickle asks for what no checkpoint needs ({_reason(error)}); nothing of it "
            "was executed"
        ) from None
    except Exception as error:
        if isinstance(error, UserError) or not _in_torch_load(error):
            raise
        sentence = f"a file of the checkpoint is damaged ({_reason(error)}); take an earlier one"
        raise CheckpointError(sentence, local=True) from error
    finally:
        del os.environ[_SWITCH]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _in_torch_load(error: Exception) -> bool:
    """Tell whether ``torch.load`` raised it, which has half a dozen kinds for a damaged file."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename == torch.serialization.__file__ for frame, _ in frames)


def _reason(error: Exception) -> str:
    """PyTorch's own words without its advice, which is to trust the file."""
    words = str(error).partition("WeightsUnpickler error: ")
    return (words[2] or words[0]).strip().split("\n")[0].split(". Please")[0][:200]


def _names() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Names that a pickle may ask for beyond tensors, each with its harmless stand-in."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    real = [LossScaler(1.0), DynamicLossScaler(1.0, 1, 1.0, 1, False), fragment_address(0, 0)]
    names: list[Any] = [(_guarded(type(thing), set(vars(thing))), _path(type(thing))) for thing in real]
    return [*names, (_stage, "deepspeed.runtime.zero.config.ZeroStageEnum"), (_member, "builtins.getattr")]


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _guarded(real: type, fields: set[str]) -> type:
    """A class whose instances become ``real`` ones when a pickle gives them their attributes, ``fields`` alone."""

    def set_state(self: Any, state: Any) -> None:
        plain = (int, float, bool, type(None), torch.dtype)
        if not isinstance(state, dict) or not state.keys() <= fields:
            raise pickle.UnpicklingError(f"other attributes of a {real.__name__}")
        if any(type(value) not in plain for value in state.values()):
            raise pickle.UnpicklingError(f"attributes of a {real.__name__} that are no numbers")
        # PyTorch sets attributes only of instances of the classes that it was told, which from here on this is not.
        self.__class__ = real
        self.__dict__.update(state)

    return type(real.__name__, (real,), {"__setstate__": set_state})


def _stage(number: Any) -> Any:
    """A function in place of ``ZeroStageEnum``: of a class, a pickle could change the members."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return ZeroStageEnum(number)


def _member(owner: Any, name: Any) -> Any:
    """Stand-in for what early releases of Python 3.11 write for a stage, as in archive.py."""
    if owner is not _stage or name not in ZERO_STAGES:
        raise pickle.UnpicklingError("an attribute")
    return _stage(ZERO_STAGES[name])

"""Turns what DeepSpeed finds wrong with its JSON, late and as an exception of any kind, into one sentence."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vqmoe_ds.config.problems import first_problem
from vqmoe_ds.runtime.errors import ConfigError, one_line

_OURS = str(Path(__file__).resolve().parents[1])
_KINDS = (AssertionError, TypeError, ValueError, LookupError, AttributeError, NameError, ArithmeticError, OSError)
"""Exceptions that DeepSpeed 0.19.8 and torch's optimizers raise at values that they do not take."""


def check_by_deepspeed(values: dict[str, Any], path: str) -> None:
    """Have DeepSpeed read the JSON, once the process group is up.

    Args:
        values: as ``EngineConfig.deepspeed``.
        path: of the JSON, for the sentence.

    Raises:
        ConfigError: it refuses, whatever it raises.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    with refusals(path):
        DeepSpeedConfig(values)


@contextmanager
def refusals(path: str) -> Iterator[None]:
    """Turn what DeepSpeed and libraries raise at the JSON at ``path`` into a ``ConfigError``.

    A defect of this package keeps its traceback.
    """
    try:
        yield
    except ValidationError as error:
        raise ConfigError(f"DeepSpeed config {path}: {first_problem(error)} ({error.title})") from None
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed config {path} asks for something that needs the Python package {error.name or error}, which "
            "cannot be imported; install it, or leave out what asks for it"
        ) from error
    except Exception as error:
        if not _of_its_input(error):
            raise
        text = " ".join(one_line(str(error), 700).split()) or "no reason given"
        kind = type(error).__name__
        raise ConfigError(f"DeepSpeed config {path}: DeepSpeed cannot work with it ({kind}): {text}") from error


def _of_its_input(error: Exception) -> bool:
    """Whether it speaks of values that were given, not of a defect or of memory."""
    # The innermost frame: every such error has frames of this package further out, which called DeepSpeed.
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    if place.startswith(_OURS):
        return False
    of_options = not {"deepspeed", "optim"}.isdisjoint(Path(place).parts)  # torch.optim
    return (
        isinstance(error, _KINDS)
        or (of_options and type(error) is RuntimeError)
        or "deepspeed" in type(error).__module__
    )

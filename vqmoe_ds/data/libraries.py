"""Libraries that only some kinds of data need, imported when they are met."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vqmoe_ds.runtime.errors import DataError


def library(module: str, package: str, purpose: str) -> Any:
    """The module of an installed package (as pip names it, with its bound); ``purpose`` says what needs it.

    Raises:
        DataError: the package is not installed, as on a machine that was given the wheels of DeepSpeed alone.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # it is there, and lacks something
            raise
        raise DataError(f"{purpose} needs {package}, which is not installed here: pip install '{package}'") from None

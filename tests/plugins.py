"""A plug-in of routers in a test, loaded as ``--plugin`` does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vqmoe_ds.config import routers as registry


@contextmanager
def loaded(file: Path, *names: str) -> Iterator[None]:
    """Inside, the routers that a file registers under these names are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(registry.PLUGINS, "")
        registry.load_plugin(file)
        try:
            yield
        finally:
            for name in names:
                registry._ROUTERS.pop(name)
            sys.modules.pop(f"vqmoe_plugin_{file.stem}")

"""What a hostile file holds."""

from __future__ import annotations

from pathlib import Path


class Evil:
    """An object whose unpickling makes a file: where that is there afterwards, code of the pickle was executed."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")

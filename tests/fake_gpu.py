"""A machine that says it has GPUs: what is decided before the first kernel runs without one.

    python -m tests.fake_gpu '{"count": 2}' launchers/pretrain.py ...

runs a command on such a machine. Nothing can be computed there: what comes after the checks fails.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def fake_gpus(
    count: int = 1, ids: str = "A", memory: float = 80e9, capability: tuple[int, int] = (9, 0)
) -> Iterator[list[str]]:
    """In this context PyTorch sees ``count`` GPUs with the unique ids ``ids`` + number; yields what was done to them.

    Args:
        memory: bytes of each.
        capability: compute capability of each.
    """
    events: list[str] = []

    def properties(device: Any) -> SimpleNamespace:
        return SimpleNamespace(uuid=f"{ids}{torch.device(device).index}", total_memory=int(memory))

    stand_ins: dict[str, Any] = {
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "set_device": lambda number: events.append(f"bound to {number}"),
        "get_device_properties": properties,
        "get_device_capability": lambda device: tuple(capability),
        "get_device_name": lambda device: "Fake GPU",
        "is_bf16_supported": lambda including_emulation: tuple(capability) >= (8, 0),
    }
    with ExitStack() as stack, patch.dict(os.environ):
        os.environ.pop("DS_ACCELERATOR", None)
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        stack.enter_context(patch("vqmoe_ds.runtime.device.read_cublas_workspace_once"))  # it multiplies
        yield events


if __name__ == "__main__":
    options, *sys.argv = sys.argv[1:]
    with fake_gpus(**json.loads(options)):
        runpy.run_path(sys.argv[0], run_name="__main__")

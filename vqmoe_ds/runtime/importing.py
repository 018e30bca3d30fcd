"""Imports of large libraries, which are nearly all that a start costs (docs/reliability.md)."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def quickly() -> Iterator[None]:
    """Context for imports in which Python does not collect garbage: it would walk all modules again and again.

    Nor does it afterwards: what is there after an import counts as permanent (``gc.freeze``).
    """
    known, looking = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looking:
            gc.enable()
        if looking and len(sys.modules) > known:
            gc.freeze()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Context in which ``torch.compile`` returns functions as they are, and imports neither Dynamo nor Inductor."""
    import torch

    def as_it_is(model: Any = None, **options: Any) -> Any:
        return functools.partial(as_it_is, **options) if model is None else model

    with patch.object(torch, "compile", as_it_is):
        yield


def step_without_dynamo() -> None:
    """Let PyTorch's optimizers made from now on step without Dynamo, whose import takes more than a second.

    They ask it not to trace some of their methods, and to break graphs around ``step``; nothing of ours compiles an
    optimizer (contract: ``tests/runtime/test_importing.py``).
    """
    from torch import optim

    for method in vars(optim.Optimizer).values():
        untraced = getattr(method, "__wrapped__", None)
        if untraced is not None and method.__module__ == optim.Optimizer.__module__:
            # Where ``torch._compile._disable_dynamo`` keeps what Dynamo gave it, and looks before it imports Dynamo.
            untraced.__dict__.setdefault("__dynamo_disable", untraced)
    for kind in vars(optim).values():
        step: Any = getattr(kind, "step", None)
        # ``_use_grad_for_differentiable`` of torch.optim: it imports Dynamo to break a graph around the step.
        if getattr(getattr(step, "__code__", None), "co_name", None) == "_use_grad":
            kind.step = _with_grad_as_asked(step.__wrapped__)


def _with_grad_as_asked(step: Any) -> Any:
    import torch

    @functools.wraps(step)
    def stepping(self: Any, *args: Any, **options: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **options)

    return stepping

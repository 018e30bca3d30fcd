"""Check 3: where a training step makes the host wait for the device, by the line that does it.

On a GPU PyTorch itself tells (``torch.cuda.set_sync_debug_mode``, which does not see collectives). On a CPU, where
nothing waits, operations are counted that would: a number read back, or an output whose size depends on values.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vqmoe_ds

from . import training
from .frame import Bench, Finding, attempt
from .report import FAILED, MEASURED, PASSED

CASES: dict[str, dict[str, Any]] = {
    "vq, top_k 0, routes ahead": {"moe__router": "vq", "moe__top_k": 0},
    "vq, top_k 1": {"moe__router": "vq", "moe__top_k": 1},
    "topk": {"moe__router": "topk", "moe__top_k": 2},
    "adaptive_clustering": {"moe__router": "adaptive_clustering", "moe__top_k": 2},
    "hash_token": {"moe__router": "hash_token"},
}
KNOWN_AHEAD = ("vq, top_k 0, routes ahead", "hash_token")
LAYERS = (2, 4)
READS = (
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "masked_select",
    "repeat_interleave",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
)
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""These read where an index is a mask."""

PACKAGES = (vqmoe_ds.__path__[0], deepspeed.__path__[0])

Place = tuple[str, str]
"""Part of the step (``micro-batch`` or ``step``) and line."""


def run(bench: Bench) -> Iterator[Finding]:
    for case, options in CASES.items():
        yield from attempt(case, partial(_find, bench, case, options))


def _find(bench: Bench, case: str, options: dict[str, Any]) -> Finding:
    found = {layers: _count(bench, layers, options) for layers in LAYERS}
    fewer, more = (sum(n for (part, _), n in found[layers].items() if part == "micro-batch") for layers in LAYERS)
    per_layer = (more - fewer) / (LAYERS[1] - LAYERS[0])
    figures: dict[str, Any] = {
        "per_layer": per_layer,
        "per_micro_batch": fewer - LAYERS[0] * per_layer,
        "per_step": sum(n for (part, _), n in found[LAYERS[0]].items() if part == "step"),
        "places": [f"{n} x {part}: {line}" for (part, line), n in found[LAYERS[0]].most_common()],
    }
    status, why = MEASURED, ""
    if case in KNOWN_AHEAD:
        good = per_layer == 0 and figures["per_micro_batch"] <= 2
        status, why = (PASSED, "") if good else (FAILED, "routes are known: 0 per layer, 2 per micro-batch at most")
    return Finding(case, status, figures, why)


def _count(bench: Bench, layers: int, options: dict[str, Any]) -> Counter[Place]:
    run = training.fields(bench, **{"model__layers": layers, **options})
    with training.trainer(bench, run, training.settings(1, "bf16")) as loop:
        training.losses(loop, 2)  # codes are initialized, kernels compiled
        with watching(bench) as found:
            loop.train_step()
        return found


@contextmanager
def watching(bench: Bench) -> Iterator[Counter[Place]]:
    """Count what makes, or would make, the host wait."""
    found: Counter[Place] = Counter()
    if not bench.cuda:
        with _HostReads(found):
            yield found
        return
    with warnings.catch_warnings():
        torch.cuda.set_sync_debug_mode("warn")
        warnings.simplefilter("always")

        def note(message: Warning | str, *_: Any, **__: Any) -> None:
            if "called a synchronizing" in str(message):
                found[_place()] += 1

        warnings.showwarning = note
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


class _HostReads(TorchDispatchMode):
    def __init__(self, found: Counter[Place]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = name in INDEXED and any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1])
        if name in READS or masks:
            self.found[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> Place:
    """The innermost line of the package or of DeepSpeed; what belongs to the optimizer's or a router's step."""
    frames = [
        frame for frame in traceback.extract_stack() if not frame.filename.startswith((torch.__path__[0], __file__))
    ]
    last = next((frame for frame in reversed(frames) if frame.filename.startswith(PACKAGES)), frames[-1])
    end = "/".join(Path(last.filename).parts[-2:])
    stepping = any(
        frame.name in ("apply_step", "_step_routers") or frame.filename.endswith("state_sync.py") for frame in frames
    )
    return "step" if stepping else "micro-batch", f"{end}:{last.lineno} {last.name}: {(last.line or '').strip()[:80]}"

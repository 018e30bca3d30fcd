"""Check 0: everything can be imported, what stands here, and what it does at best."""

from __future__ import annotations

import importlib
import platform
import re
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vqmoe_ds.moe.kernels.triton_support import why_no_triton

from .frame import Bench, Finding
from .report import FAILED, MEASURED, PASSED, SKIPPED

CLOSURE = (
    "train.pretrain",
    "train.loop",
    "train.engine",
    "checkpoint.resume.session",
    "checkpoint.load_model",
    "checkpoint.formats.portable",
    "evaluation.generate",
    "evaluation.evaluate",
    "moe.layer",
)


def facts(device: torch.device) -> dict[str, Any]:
    """Names and versions; the first line of every run."""
    versions = {name: _version(name) for name in ("deepspeed", "triton", "numpy", "pydantic")}
    found = {"python": platform.python_version(), "torch": torch.__version__, **versions, "device": str(device)}
    if device.type != "cuda":
        return {**found, "card": "none", "threads": torch.get_num_threads()}
    card = torch.cuda.get_device_properties(device)
    return {
        **found,
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_GiB": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "L2_MiB": getattr(card, "L2_cache_size", 0) / 2**20,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def run(bench: Bench) -> Iterator[Finding]:
    started = time.perf_counter()
    for name in CLOSURE:
        importlib.import_module(f"vqmoe_ds.{name}")
    yield Finding("imports", PASSED, {"modules": len(CLOSURE), "seconds": round(time.perf_counter() - started, 1)})
    yield _triton(bench)
    rates = bench.rates
    yield Finding("rates", MEASURED, {"copy_GB_s": rates.copy / 1e9, "product_TFLOP_s": rates.product / 1e12})


def _triton(bench: Bench) -> Finding:
    """Without Triton every figure of ours would be of PyTorch's own operations."""
    if not bench.cuda:
        return Finding("triton", SKIPPED, why="kernels run on GPUs alone")
    why = why_no_triton()
    return Finding("triton", FAILED if why else PASSED, why=why or "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", path.read_text(encoding="utf-8")) if path.exists() else None
    return found.group() if found else "unknown"

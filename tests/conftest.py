"""One thread for everybody: results do not depend on the machine's cores, and ranks may be forked from here.

Tests marked ``gpu`` need a process of their own: DeepSpeed chooses between CPU and GPU once, at its import, Triton
between its interpreter and its compiler, and ranks cannot be forked from a process that has touched a GPU. So they run
under ``-m gpu`` alone (``make test-gpu``), and only their files are imported then: a GPU machine may lack what others
need.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA

import pytest
import torch

torch.set_num_threads(1)

LONGEST = (
    *("test_parity.py", "models/test_hf_use.py", "test_gpu_benchmark.py", "test_tutorial.py"),
    *("train/test_sequence_parallel.py", "train/test_image_layouts.py", "train/test_sp_placement.py"),
    *("train/test_optimizers.py", "launchers/test_faults.py", "models/test_hf.py", "launchers/test_evaluate.py"),
    *("runtime/test_stopping.py", "moe/test_router_parity.py", "launchers/test_pretrain.py", "models/test_vision.py"),
    *("moe/test_add_a_router.py", "checkpoint/test_restore.py", "finetune/test_sharing.py", "train/test_fused_adam.py"),
    *("checkpoint/test_store.py", "launchers/test_images.py", "checkpoint/huggingface/test_round_trip.py"),
)
"""Files that two workers begin with (``make test``), so that both end at about the same time: half of all seconds."""


def _only_gpu(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "gpu"


def pytest_configure(config: pytest.Config) -> None:
    if _only_gpu(config) and torch.cuda.device_count():
        os.environ.update(DS_ACCELERATOR="cuda", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not _only_gpu(config) or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    return None if "mark.gpu" in text or "from tests.kernels import" in text else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = None
    if not torch.cuda.device_count():
        reason = "no CUDA device"
    elif not _only_gpu(config):
        reason = "tests of the GPU run by themselves: make test-gpu"
    for item in items if reason is not None else ():
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
    if hasattr(config, "workerinput"):  # of pytest-xdist
        places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def _logger_as_imported() -> Iterator[None]:
    """Leave no handler or level of a test's command on the package's logger: the next test may read its records."""
    yield
    logger = logging.getLogger("vqmoe_ds")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(autouse=True)
def _fresh_random_numbers() -> None:
    torch.manual_seed(0)

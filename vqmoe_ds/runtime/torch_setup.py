"""Set-up of torch and of DeepSpeed's process group on one rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from vqmoe_ds.runtime.device import bind, make_deterministic, uses_gpu
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.meeting import meet
from vqmoe_ds.runtime.ranks import Place


def set_up_torch(
    place: Place,
    start_timeout: float = 300.0,
    exact: bool = False,
    check: Callable[[torch.device], None] | None = None,
) -> torch.device:
    """Set up threads, quiet libraries, this rank's device and the process group. Call before building anything.

    Args:
        start_timeout: as ``run.start_timeout``.
        exact: as ``train.deterministic``.
        check: of the device, by this rank; a ``ConfigError`` of it is that of all ranks.

    Returns:
        The device of this rank, the current one from now on.

    Raises:
        ConfigError: the ranks' devices do not go together, or one of them cannot do what is asked.
        PeerLost: the ranks do not find each other in that time.
    """
    warnings.filterwarnings("ignore")
    if not uses_gpu() and "OMP_NUM_THREADS" not in os.environ:
        # PyTorch would take all cores in each of the ranks that share them.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // place.local_world_size))
    # Before bind: its first matrix product is where PyTorch reads the workspace of cuBLAS that this sets.
    make_deterministic(exact)
    device, trouble = torch.device("cpu"), None
    try:
        device = bind(place)
        if check is not None:
            check(device)
    except ConfigError as error:
        # Raised after the meeting, on all ranks: the others would wait for this one there.
        trouble = str(error)
    # Before init_distributed, whose TorchBackend looks for the operator.
    build_no_shared_memory_op()
    if not dist.is_initialized():
        backend = get_accelerator().communication_backend_name()
        # ``init_distributed`` takes over a group that is up.
        meet(place, backend, start_timeout, device, trouble)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    elif trouble is not None:
        raise ConfigError(trouble)
    return device


def build_no_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce of CPUs (a minute of g++ at the first launch).

    Gloo serves. DeepSpeed looks the operator up in a table that it makes by probing every operator at the first look;
    a table of our own, with this entry alone, is never made.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False

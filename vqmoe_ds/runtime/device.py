"""The device of a rank: which GPU it takes, whether the ranks' GPUs go together, and what PyTorch is told about it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vqmoe_ds.runtime.errors import ConfigError, reason_of
from vqmoe_ds.runtime.importing import quickly

if TYPE_CHECKING:
    import torch

    from vqmoe_ds.runtime.ranks import Place

ACCELERATOR = "DS_ACCELERATOR"
"""DeepSpeed's variable that overrides its choice of a processor: ``cpu`` keeps a run off the GPUs of its machine."""

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def uses_gpu() -> bool:
    """Whether this process computes on a GPU; decided as DeepSpeed does, without importing it.

    Raises:
        ConfigError: as ``asked_accelerator``.
    """
    with quickly():  # in most commands this is the first import of it
        import torch

    asked = asked_accelerator()
    return torch.cuda.is_available() if asked is None else asked == "cuda"


def asked_accelerator() -> str | None:
    """``cpu`` or ``cuda`` where the environment asks for one; commands look before they import DeepSpeed.

    Raises:
        ConfigError: it asks for another one.
    """
    asked = os.environ.get(ACCELERATOR)
    if asked not in (None, "cpu", "cuda"):
        raise ConfigError(f"{ACCELERATOR}={asked} is not supported here; set it to cpu or cuda, or unset it")
    return asked


def choose(place: Place, visible: int) -> int:
    """Number of the rank's GPU among the ``visible`` ones.

    All ranks of a machine may see all of its GPUs (deepspeed, torchrun), or each its own alone, which is number 0 to
    every one of them (``srun --gpus-per-task=1``, ``CUDA_VISIBLE_DEVICES`` of a rank).

    Raises:
        ConfigError: no GPU, or more than one but none for this rank.
    """
    here = f"{place.local_world_size} rank(s) run on {socket.gethostname()}"
    seen = f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}"
    if visible == 0:
        raise ConfigError(
            f"{ACCELERATOR}=cuda asks for a GPU, and rank {place.rank} sees none ({seen}); unset it, or look at "
            "nvidia-smi and torch.cuda.is_available()"
        )
    # Whether another rank sees the same one is found by ``contradiction``.
    if visible == 1:
        return 0
    if visible <= place.local_rank:
        raise ConfigError(
            f"{here}, and rank {place.rank} sees {visible} GPUs ({seen}); start at most {visible} ranks here, or show "
            "each rank one GPU of its own (srun --gpus-per-task=1)"
        )
    return place.local_rank


def bind(place: Place) -> torch.device:
    """Make the rank's GPU the current one, before anything else touches CUDA; ``cpu`` where the run uses none.

    Raises:
        ConfigError: as ``choose``, or the GPU cannot be used: others fill it, it is another's alone, or it is too old.
    """
    import torch

    if not uses_gpu():
        return torch.device("cpu")
    number = choose(place, torch.cuda.device_count())
    try:
        torch.cuda.set_device(number)
        read_cublas_workspace_once(torch.device("cuda", number))
    except RuntimeError as error:
        raise ConfigError(
            f"rank {place.rank} on {socket.gethostname()} cannot use GPU {number} ({reason_of(error)}); look at "
            "nvidia-smi, or name others in CUDA_VISIBLE_DEVICES"
        ) from None
    # DeepSpeed takes its device from LOCAL_RANK, and insists that Open MPI's variable says the same.
    os.environ["LOCAL_RANK"] = str(number)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(number)
    return torch.device("cuda", number)


def read_cublas_workspace_once(device: torch.device) -> None:
    """Take the workspace's setting out of the environment once PyTorch has seen it.

    PyTorch 2.11 parses the variable with a regular expression at every matrix product, 50 us of the host's time each
    (``CublasHandlePool.cpp: parseChosenWorkspaceSize``); whether products are deterministic it remembers from the first
    one (``Context.cpp: alertCuBLASConfigNotDeterministic``). They stay so without it: what makes them differ is
    cuBLAS's own workspace, and PyTorch gives each stream one.
    """
    import torch

    if os.environ.get(CUBLAS_WORKSPACE) == ":4096:8":  # another size was asked for by the user, and stays
        one = torch.ones(1, 1, device=device)
        torch.mm(one, one)
        del os.environ[CUBLAS_WORKSPACE]


def bind_single() -> torch.device:
    """The device of a command of one process, bound, and named to DeepSpeed, whose own search for it prints a line.

    Such commands read texts of any length, for which cuDNN's attention is slow (``without_cudnn_attention``).

    Raises:
        ConfigError: as ``bind``.
    """
    import torch

    from vqmoe_ds.runtime.ranks import Place

    device = bind(Place(0, 1, 0, 1))
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault(ACCELERATOR, device.type)
    return device


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep attention off cuDNN, which plans for every new length: 8 ms per layer and token of a text on an H100."""
    import torch

    on = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(on)


def make_deterministic(exact: bool) -> None:
    """Tell PyTorch to prefer deterministic kernels; call it before the first use of CUDA.

    Args:
        exact: on a GPU, refuse operations that have none. Attention's backward (flash and memory-efficient) is
            deterministic only then, and slower; cuDNN's attention, which never is, stays off
            (ATen ``attention_backward.cu``, ``sdp_utils.cpp: check_cudnn_deterministic``).
    """
    import torch

    on_gpu = uses_gpu()
    if on_gpu:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # read at the first product
        torch.backends.cuda.enable_cudnn_sdp(not exact)
    # use_deterministic_algorithms does the same and imports PyTorch's compiler, which is not used here.
    torch.set_deterministic_debug_mode("error" if on_gpu and exact else "warn")
    # Or every empty buffer would be written once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


# ---------------------------------------------------------------- do the ranks' devices go together?


@dataclass(frozen=True)
class Seat:
    """Facts of a rank's device that the others learn before they start to communicate."""

    host: str
    gpu: str | None
    """Unique id of its GPU; None: the rank computes on the CPU."""
    trouble: str | None
    """Reason why the rank cannot run, if there is one."""


def seat(device: torch.device, trouble: str | None) -> Seat:
    """This rank's seat; ``trouble`` is what it found out so far."""
    import torch

    # The id and not the number, which CUDA_VISIBLE_DEVICES makes relative to the process.
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    return Seat(socket.gethostname(), gpu, trouble)


def contradiction(seats: Sequence[Seat]) -> str | None:
    """A sentence on why ranks on these seats, in rank order, cannot run together; None where they can."""
    # First: a rank in trouble may have bound no GPU, and would seem to compute on the CPU.
    for one in seats:
        if one.trouble is not None:
            return one.trouble
    with_gpu = [rank for rank, one in enumerate(seats) if one.gpu is not None]
    without = [rank for rank, one in enumerate(seats) if one.gpu is None]
    if with_gpu and without:
        return (
            f"rank {with_gpu[0]} on {seats[with_gpu[0]].host} has a GPU, and rank {without[0]} on "
            f"{seats[without[0]].host} sees none: give every rank one (nvidia-smi, CUDA_VISIBLE_DEVICES, the job's "
            f"GPU request), or set {ACCELERATOR}=cpu for all"
        )
    taken: dict[tuple[str, str | None], int] = {}
    for rank in with_gpu:
        key = (seats[rank].host, seats[rank].gpu)
        if key in taken:
            return (
                f"ranks {taken[key]} and {rank} on {seats[rank].host} would share the GPU {seats[rank].gpu}: start as "
                "many ranks there as it has GPUs, or show each rank another one (CUDA_VISIBLE_DEVICES, "
                "srun --gpus-per-task=1)"
            )
        taken[key] = rank
    return None


# ---------------------------------------------------------------- what the GPU can do


def describe(device: torch.device) -> str:
    """A GPU's name and memory, for people."""
    import torch

    return f"{torch.cuda.get_device_name(device)}, {total_memory(device) / 1e9:.0f} GB"


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, whoever uses them."""
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def check_precision(device: torch.device, precision: str, remedy: str) -> None:
    """Refuse bf16 on a GPU that only emulates it.

    Args:
        precision: bf16, fp16 or fp32.
        remedy: how to choose another one.

    Raises:
        ConfigError: the GPU is too old.
    """
    import torch

    if device.type != "cuda" or precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False):
        return
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    raise ConfigError(f"{device} ({name}, compute capability {major}.{minor}; bf16 needs 8.0) has no bf16; {remedy}")


OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""Parts of messages of the plain ``RuntimeError`` that PyTorch raises where memory outside its allocator is short."""


@contextmanager
def memory_errors(rank: int, device: torch.device, remedy: Callable[[], str]) -> Iterator[None]:
    """Context that turns CUDA's out-of-memory errors into one sentence, which ends with what ``remedy`` gives.

    Raises:
        ConfigError: instead of PyTorch's error.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        first_line = str(error).partition("\n")[0]
        reason = ": ".join(first_line.split(". ")[:2])  # the third and later ones are of PyTorch's allocator
        raise ConfigError(
            f"rank {rank} on {socket.gethostname()}: {device} has too little memory ({reason}); {remedy()}", local=True
        ) from error

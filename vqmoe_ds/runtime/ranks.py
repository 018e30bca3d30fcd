"""This process's place in the run, from whichever launcher started it.

More than one launcher may have left its variables: mpirun inside sbatch gives every rank ``SLURM_PROCID=0``, and
torchrun started by srun on every node gives the ranks of a node the same ``SLURM_PROCID``. The inner launcher is right,
so the order is: ``RANK`` (deepspeed, torchrun), Open MPI, other MPIs (MPICH, Intel MPI), SLURM, a single process.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from typing import Any

from vqmoe_ds.runtime.errors import ConfigError, shown
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.parents import process


@dataclass(frozen=True)
class Place:
    """Global rank, ranks in all, rank on this machine and ranks on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True)
class _Launcher:
    """Names of the variables a launcher sets; of several, the first that is there counts."""

    name: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]


_TORCH = _Launcher(
    "deepspeed or torchrun", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
)
_OPEN_MPI = _Launcher(
    "mpirun",
    "OMPI_COMM_WORLD_RANK",
    ("OMPI_COMM_WORLD_SIZE",),
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_PMI = _Launcher(
    "mpiexec", "PMI_RANK", ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
)
# The step's number first: srun -n may start fewer tasks than the job has.
_SLURM = _Launcher("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",), ())

FIRST_PORT, PORTS = 10_000, 20_000
"""Rendezvous ports that follow from a job or launcher: below the range from which systems give away ports."""
_DEEPSPEEDS_PORT = "29500"
"""Port of ``deepspeed``, unless ``--master_port`` names another."""


def find_place(local_rank: int | None = None) -> Place:
    """The place of this process; ``RANK``, ``MASTER_ADDR`` and so on are then set for torch and DeepSpeed.

    A process that no launcher started is a run of one rank.

    Args:
        local_rank: as old launchers hand it over on the command line.

    Raises:
        ConfigError: variables are missing or contradict each other, or the rendezvous cannot be found.
    """
    launcher = _launcher()
    place = Place(0, 1, 0, 1) if launcher is None else _read(launcher, local_rank)
    _check(place, launcher)
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.local_rank))
    # Without LOCAL_SIZE DeepSpeed starts a process at every ZeRO-3 gather.
    os.environ.setdefault("LOCAL_SIZE", str(place.local_world_size))
    given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if os.environ.get(name)}
    _check_meeting(given)
    if len(given) < 2:
        address, port = _rendezvous(place, launcher)
        os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": str(port), **given})
    elif launcher is _TORCH and only_this_host(os.environ["MASTER_ADDR"]):
        os.environ["MASTER_PORT"] = str(_own_port() or os.environ["MASTER_PORT"])
    return place


def likely_rank() -> int:
    """The likely rank where ``find_place`` fails, so that one process speaks for all."""
    for name in (_TORCH.rank, _OPEN_MPI.rank, _PMI.rank, _SLURM.rank):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def _launcher() -> _Launcher | None:
    environ = os.environ
    for launcher in (_TORCH, _OPEN_MPI):
        if launcher.rank in environ:
            return launcher
    # srun --mpi=pmi2 sets PMI_RANK as well, but not the local rank.
    if _PMI.rank in environ and any(name in environ for name in _PMI.local_rank):
        return _PMI
    if _SLURM.rank in environ and _in_srun():
        return _SLURM
    return None


def _in_srun() -> bool:
    """Whether srun started this process, rather than the batch script of the job.

    Raises:
        ConfigError: the batch script of a job of several tasks, where one rank would wait for the others for ever.
    """
    if "SLURM_STEP_ID" in os.environ:  # a batch script has SLURM_PROCID=0 too, but is no step
        return True
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1":
        raise ConfigError(
            f"SLURM job {os.environ.get('SLURM_JOB_ID')} has {tasks} tasks, and this process is its batch script: "
            "put srun (or a launcher such as torchrun) before the command"
        )
    return False


def _read(launcher: _Launcher, given_local_rank: int | None) -> Place:
    rank = _number(launcher.rank)
    world = _first(launcher.world_size)
    if world is None:
        raise ConfigError(
            f"{launcher.rank}={rank} is set, but not {launcher.world_size[-1]}: start all ranks with one launcher, or "
            f"unset {launcher.rank} for a run of one rank",
            local=True,
        )
    if launcher is not _TORCH and os.environ.get("WORLD_SIZE", str(world)) != str(world):
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} contradicts the {world} ranks that {launcher.name} started; "
            "unset WORLD_SIZE"
        )
    local = _first(launcher.local_rank)
    if local is None:
        local = given_local_rank or 0
    local_world = _tasks_here(world) if launcher is _SLURM else _first(launcher.local_world_size)
    return Place(rank, world, local, world if local_world is None else local_world)


def _check(place: Place, launcher: _Launcher | None) -> None:
    for kind, one, all_ in (
        ("rank", place.rank, place.world_size),
        ("local rank", place.local_rank, place.local_world_size),
    ):
        if not 0 <= one < all_:
            raise ConfigError(
                f"{launcher.name if launcher else 'nobody'} says that this is {kind} {one} of {all_}, which cannot be; "
                "look for variables of another launcher in the environment (env | grep -E 'RANK|SIZE|SLURM')",
                local=True,  # there may be no rank 0 that speaks for it
            )


def _tasks_here(world: int) -> int:
    """Tasks on this node from ``SLURM_STEP_TASKS_PER_NODE``, such as ``2(x3),1``."""
    name = next((n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if os.environ.get(n)), None)
    text = str(world) if name is None else os.environ[name]
    if not re.fullmatch(r"\d{1,6}(\(x\d{1,6}\))?(,\d{1,6}(\(x\d{1,6}\))?)*", text, re.ASCII):
        raise ConfigError(f"{name}={shown(text)} in the environment is not of the form 2(x3),1; unset it, or use srun")
    node = _number("SLURM_NODEID", 0)
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        node -= int(repeat or 1)
        if node < 0:
            return int(count)
    return int(count)


def _first(names: tuple[str, ...]) -> int | None:
    return next((_number(name) for name in names if os.environ.get(name)), None)


def _number(name: str, default: int | None = None) -> int:
    """A variable's value, from 0 to 10^9.

    Raises:
        ConfigError: it is another, or there is none and no default.
    """
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ConfigError(f"{name}={shown(text)} in the environment is not a number; unset it, or use a launcher")
    return int(text)


# ---------------------------------------------------------------- where the ranks meet


def _rendezvous(place: Place, launcher: _Launcher | None) -> tuple[str, int]:
    """Address and port of rank 0, the same on all ranks."""
    if launcher is None:
        return "127.0.0.1", _free_port()
    if launcher is _SLURM:
        one_node = place.local_world_size == place.world_size
        # Loopback, where one host suffices: no other reaches the store, which asks for no password (docs/security.md).
        return "127.0.0.1" if one_node else _first_host(), _port_of_job()
    if launcher is _TORCH:
        raise ConfigError("RANK is set, but not MASTER_ADDR and MASTER_PORT: set the address of rank 0 and a free port")
    return _ask_mpi(place)


def _check_meeting(given: dict[str, str]) -> None:
    port, address = given.get("MASTER_PORT", "1"), given.get("MASTER_ADDR", "localhost")
    if not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 0 < int(port) < 65536:
        raise ConfigError(
            f"MASTER_PORT={shown(port)} in the environment is not a port (Kubernetes sets such a one for a service "
            "named master); set it to a free port of rank 0, from 1024 to 65535, or unset it"
        )
    if not re.fullmatch(r"[\w.:%-]{1,253}", address, re.ASCII):
        raise ConfigError(
            f"MASTER_ADDR={shown(address)} in the environment is not a host; set it to the name or address of rank 0"
        )


def only_this_host(address: str) -> bool:
    """Whether an address is loopback's as it stands: a host's own name may mean loopback to that host alone."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _own_port() -> int | None:
    """The port of this launch, where ``deepspeed`` gave the ranks of one host the one that it gives everybody.

    It follows from the process that started the ranks. So two runs on one machine do not meet.
    """
    starter = process(os.getppid())
    if starter is None or not starter.is_deepspeed_node or os.environ["MASTER_PORT"] != _DEEPSPEEDS_PORT:
        return None
    return FIRST_PORT + (starter.pid * 101 + starter.started * 7919) % PORTS


def _first_host() -> str:
    """The host of task 0, which is the first of the step's nodes."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not re.search(r"[\[,]", nodes):
        return nodes or "127.0.0.1"
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=60)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise ConfigError(
            f"the first host of {nodes} is unknown, because scontrol does not run here (in a container?); "
            "set MASTER_ADDR before srun"
        ) from None


def _port_of_job() -> int:
    """A port all ranks agree on without talking: of job, step and restart, whose processes may meet on one host."""
    job, step, restart = (_number(name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    # Primes, so that neighbouring jobs, steps and restarts seldom get the same port.
    return FIRST_PORT + (job * 101 + step * 11 + restart * 1009) % PORTS


def _ask_mpi(place: Place) -> tuple[str, int]:
    """Address and a free port of rank 0, told to the others through MPI, which is not used after that."""
    hint = "set MASTER_ADDR and MASTER_PORT (mpirun -x MASTER_ADDR=... -x MASTER_PORT=...)"
    try:
        mpi4py = library("mpi4py", "mpirun without MASTER_ADDR and MASTER_PORT")
        # mpi4py would start MPI at its import and end it at the exit of the process.
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"mpirun started the ranks, and mpi4py cannot be used ({error}): {hint}") from None
    MPI.Init()
    world = MPI.COMM_WORLD
    if world.size != place.world_size:
        raise ConfigError(f"the MPI of mpi4py is another than that of mpirun, for it sees {world.size} rank(s): {hint}")
    one_host = place.local_world_size == place.world_size
    mine = ("127.0.0.1" if one_host else socket.gethostname(), _free_port()) if place.rank == 0 else None
    address, port = world.bcast(mine)
    MPI.Finalize()
    return address, port


def _free_port() -> int:
    with socket.socket() as probe:
        # Free now; if another process is faster than rank 0, ``meet`` says that the port is taken.
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- one answer


def several_ranks() -> bool:
    """Whether a process group is up and has more than this rank."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def from_first(value: Any, group: Any = None) -> Any:
    """Rank 0's value on all ranks of a process group (the default one), which call this together.

    Ranks may see other states of a file system, or other first free names in it.
    """
    if not several_ranks():
        return value
    import torch.distributed as dist

    answer = [value]
    dist.broadcast_object_list(answer, src=0, group=group)
    return answer[0]

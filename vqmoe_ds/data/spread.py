"""Distribution of units over processes: this one alone, workers of this machine, or the ranks of ``mpirun``.

Which process makes a part never shows in it, so the three give the same bytes.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from vqmoe_ds.data.parts import Counts, Parts
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.data.units import Unit
from vqmoe_ds.runtime.errors import DataError, reason_of
from vqmoe_ds.runtime.extras import library

Done = Callable[[Unit, Counts], None]
"""Called in the first process for every part that is finished; what it raises ends the work."""

_PAUSE = 0.02  # seconds between looks at the mail: MPI's own waiting would take a core from the ranks that work


def run_alone(parts: Parts, units: Sequence[Unit], done: Done) -> None:
    """Make the parts one after the other."""
    for unit in units:
        done(unit, parts.make(unit))


# ---------------------------------------------------------------- workers

# Of a worker: its tokenizer is loaded once, not for each unit.
_parts: Parts | None = None


def run_workers(parts: Parts, units: Sequence[Unit], done: Done, workers: int, tokenizer: str) -> None:
    """Make the parts in ``workers`` processes, the next unit to whoever is free.

    Raises:
        DataError: of a worker, after the units that others had begun; or one was killed.
    """
    context = multiprocessing.get_context("fork" if _fork_is_safe() else "spawn")
    start = (tokenizer, str(parts.folder))
    # Not multiprocessing.Pool, which waits for ever for the result of a worker that was killed.
    with ProcessPoolExecutor(min(workers, len(units)), context, _start_worker, start) as pool:
        try:
            waiting = {pool.submit(_make, unit): unit for unit in units}
            for future in as_completed(waiting):
                done(waiting[future], future.result())
        except BrokenProcessPool as error:
            raise DataError(
                "a worker was killed (out of memory?); give the same command again, perhaps with fewer --workers: it "
                "goes on from the parts that are finished"
            ) from error
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            # Without cancel_futures the pool's own end would first make every unit that waits.
            pool.shutdown(cancel_futures=True)


def _fork_is_safe() -> bool:
    """Whether workers may be forked: that starts them at once, but breaks libraries that have threads of their own."""
    threads = threading.active_count() > 1 or {"pyarrow", "datasets", "torch"} & set(sys.modules)
    return sys.platform == "linux" and not threads


def _start_worker(tokenizer: str, folder: str) -> None:
    global _parts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it and ends the others
    # A forked worker has inherited the handler of run_tool, which raises where terminate() should end it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A parent that is killed tells nobody: its workers would wait for the next unit for ever.
    threading.Thread(target=_follow_parent, daemon=True).start()
    _parts = Parts(folder, load_tokenizer(tokenizer))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(unit: Unit) -> Counts:
    assert _parts is not None
    return _parts.make(unit)


# ---------------------------------------------------------------- ranks


def launched_ranks() -> int:
    """Ranks that an MPI launcher started, told by its variables; 1 without one.

    Raises:
        DataError: several tasks of ``srun`` that MPI does not join.
    """
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    # PMIx gives a rank but no size.
    if "PMIX_RANK" in os.environ:
        return int(tasks)
    if tasks != "1":
        raise DataError(f"srun started {tasks} tasks without MPI; add --mpi=pmix (srun --mpi=list shows what it has)")
    return 1


def world(ranks: int) -> Any:
    """MPI's communicator of all ranks; an exception that escapes on any of them ends them all.

    Raises:
        DataError: mpi4py is missing, or made for another MPI than the launcher's.
    """
    try:
        library("mpi4py", "preparing data on several ranks", DataError)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = reason_of(error)
        raise DataError(f"mpi4py does not work ({reason}); install it against the MPI of this machine") from error
    # The import has called MPI_Init, so that from here on a rank that just exits leaves the others waiting.
    comm = MPI.COMM_WORLD
    if comm.size != ranks:
        raise DataError(
            f"the launcher started {ranks} ranks and mpi4py sees {comm.size}: they are of different MPIs; use the "
            "mpirun beside this python, or rebuild mpi4py (pip install --no-binary mpi4py --force-reinstall mpi4py)"
        )

    def end_all(kind: Any, error: Any, trace: Any) -> None:
        sys.__excepthook__(kind, error, trace)
        sys.stderr.flush()
        comm.Abort(1)

    sys.excepthook = end_all
    return comm


def run_ranks(comm: Any, parts: Parts, units: Sequence[Unit], done: Done) -> None:
    """Make this rank's share of the parts; rank 0 returns when all are made, the others when it has ``dismissed`` them.

    Raises:
        DataError: on rank 0, of whichever rank met it first.
    """
    # Each rank deals for itself: the shares must follow from the units alone, or one is made twice and another never.
    share = deal(units, comm.size)[comm.rank]
    if comm.rank:
        try:
            run_alone(parts, share, lambda unit, counts: comm.send((unit, counts), 0))
        except DataError as error:
            comm.send((None, str(error)), 0)  # rank 0 says it, once, and ends all
        wait_for_dismissal(comm)
        return
    left = len(units)

    def receive() -> None:
        nonlocal left
        while comm.iprobe():
            unit, outcome = comm.recv()
            if unit is None:
                raise DataError(outcome)
            done(unit, outcome)
            left -= 1

    for unit in share:
        done(unit, parts.make(unit))
        left -= 1
        receive()
    while left:
        receive()
        time.sleep(_PAUSE)


def deal(units: Sequence[Unit], ranks: int) -> list[list[Unit]]:
    """Units for every rank: the largest first, each to the rank with the least so far; in order within a rank."""
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(units)), key=lambda i: -units[i].size):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        # + 1, so that units of no bytes are shared out as well.
        heapq.heappush(loads, (load + units[index].size + 1, rank))
    return [[units[index] for index in sorted(share)] for share in shares]


def send_plan(comm: Any, plan: Any) -> None:
    """Wake the other ranks, which sleep while rank 0 plans, and give them the plan; called on rank 0."""
    dismiss(comm)
    comm.bcast(plan)


def receive_plan(comm: Any) -> Any:
    """The plan of rank 0; called on the other ranks."""
    wait_for_dismissal(comm)
    return comm.bcast(None)


def dismiss(comm: Any) -> None:
    """Let the other ranks go; called on rank 0."""
    for rank in range(1, comm.size):
        comm.send(None, rank)


def wait_for_dismissal(comm: Any) -> None:
    """Sleep until rank 0 lets this rank go, or ends it; called on the other ranks."""
    while not comm.iprobe(source=0):
        time.sleep(_PAUSE)
    comm.recv(source=0)

"""Real ranks on this machine: a function runs in every one of ``world`` forked processes over gloo.

DeepSpeed is imported once, here, and its memory shared by fork, so a launch costs about a second.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from tqdm import tqdm

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # A CUDA build without a GPU makes one up for FakeTensorMode (checkpoint/io/skeleton.py), for which backward then
    # keeps a thread, so that no rank forked from here could run backward any more. Tests fake CPU tensors alone.
    torch._C._ensureCUDADeviceGuardSet = lambda: None


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time."""


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run ``fn(rank, world, *args)`` on ``world`` ranks and return their results in rank order.

    Every rank has an initialised default process group and random numbers of its own. Results are pickled by value.

    Raises:
        RankFailure: with the traceback of the first rank that failed; all others are killed.
    """
    import_what_engines_import()
    torch.set_num_threads(1)  # a child must not inherit a pool of threads that do not exist in it
    context = multiprocessing.get_context("fork")
    port = _free_port()
    processes, answers = [], []
    for rank in range(world):
        answer, question = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(question, rank, world, port, timeout, fn, args), daemon=True)
        process.start()
        question.close()
        processes.append(process)
        answers.append(answer)
    try:
        return _gather(answers, time.monotonic() + timeout, timeout)
    except RankFailure as failure:  # which may be of a rank that misses the one that died
        for process in processes:
            process.join(0.5)
        died = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
        failure.add_note(f"ranks that died, with their exit codes: {died or 'none'}")
        raise
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


@functools.cache
def import_what_engines_import() -> None:
    """Three seconds here, once, instead of ten in every launch: ``deepspeed.initialize`` imports lazily."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compile workers
    for name in ("muon.muon_optimizer", "stage_1_and_2", "stage3"):
        importlib.import_module(f"deepspeed.runtime.zero.{name}")
    importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")
    gc.collect()
    gc.freeze()  # ZeRO-3 collects garbage at every start: what stands here need not be walked again


def take_own_bars() -> None:
    """In a fork: a lock of its own for progress bars, without the thread that looks after them in the parent.

    The lock that tqdm makes is shared with forks, and stays held for good where one is killed while it has it.
    """
    tqdm.set_lock(threading.RLock())
    tqdm.monitor = None


def _gather(answers: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(answers):
        waiting = [answer for rank, answer in enumerate(answers) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(answers)) if rank not in results]
            raise RankFailure(f"ranks {missing} did not finish within {timeout:g} s")
        for answer in ready:
            rank = next(r for r, a in enumerate(answers) if a is answer)
            try:
                succeeded, payload = pickle.loads(answer.recv_bytes())
            except EOFError:
                raise RankFailure(f"rank {rank} died without an answer") from None
            if not succeeded:
                raise RankFailure(f"rank {rank} failed:\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in range(len(answers))]


def _rank_main(
    question: Connection,
    rank: int,
    world: int,
    port: int,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(max(1.0, timeout - 2), file=sys.__stderr__)
    warnings.simplefilter("ignore")
    take_own_bars()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(1000 + rank)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "LOCAL_SIZE": world}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        deepspeed.utils.logger.setLevel(logging.ERROR)
        torch.set_printoptions(threshold=1, edgeitems=1)  # ZeRO-3 writes out every parameter, for nobody
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False  # would be compiled
        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=timeout), auto_mpi_discovery=False, verbose=False)
        question.send_bytes(pickle.dumps((True, fn(rank, world, *args))))
        torch.distributed.barrier()  # nobody leaves while others still need the store on rank 0
    except BaseException:
        question.send_bytes(pickle.dumps((False, traceback.format_exc())))


_held: deque[socket.socket] = deque(maxlen=16)


def _free_port() -> int:
    """A port of this machine that the system gives to nobody else until rank 0 listens at it.

    The socket stays bound, without listening: another test's ranks, at the same time in another worker, get other
    ports, and whoever names this one may bind it too (both set ``SO_REUSEADDR``, as every listener of PyTorch does).
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return int(held.getsockname()[1])

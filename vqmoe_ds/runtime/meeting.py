"""The rendezvous of ranks: the store they meet at, a look at their devices, and the process group, in bounded time."""

from __future__ import annotations

import errno
import json
import os
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

from vqmoe_ds.runtime.device import Seat, contradiction, seat
from vqmoe_ds.runtime.errors import ConfigError, UserError, reason_of
from vqmoe_ds.runtime.ranks import Place, only_this_host

CPU = torch.device("cpu")
_AFTER_TIMEOUT = 2.0
"""Seconds by which PyTorch may exceed its own limit."""
_BACKLOG = 2048


class PeerLost(UserError):
    """A rank went missing, or the ranks never found each other."""

    exit_code = 76

    def __init__(self, message: str, exit_code: int = exit_code, rank: int | None = None, local: bool = False) -> None:
        super().__init__(message, local)
        self.exit_code = exit_code
        self.rank = rank
        """Number of the rank that is missing, if one is."""


def meet(place: Place, backend: str, seconds: float, device: torch.device = CPU, trouble: str | None = None) -> None:
    """Set up the default process group; the ranks find each other at ``MASTER_ADDR:MASTER_PORT``.

    Args:
        seconds: for which they wait for each other.
        device: this rank's, already the current one.
        trouble: why this rank cannot run on it: then all ranks leave with that sentence.

    Raises:
        ConfigError: a rank is in trouble, the ranks' devices do not go together, or NCCL does not start.
        PeerLost: rank 0 cannot be reached, or not all ranks came in time.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store = _in_time(partial(_meeting_store, place, address, int(port), seconds), seconds + _AFTER_TIMEOUT)
        # Before the backend starts: it would wait for a rank without a device, or fail without naming it.
        verdict = _compare_devices(store, place, seat(device, trouble))
        if not verdict:
            _start_backend(backend, place, device, store)
    except (RuntimeError, ValueError, OSError) as error:  # those of torch.distributed are RuntimeErrors
        reason = reason_of(error)
        what = f"rank {place.rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port}"
        if place.rank == 0:
            what = f"not all {place.world_size} ranks came to rank 0 at {address}:{port} within {seconds:g} s"
        if "EADDRINUSE" in str(error) or getattr(error, "errno", None) == errno.EADDRINUSE:
            flag = "deepspeed --master_port N" if "CROSS_RANK" in os.environ else "MASTER_PORT"
            what = f"port {port} of rank 0 at {address} is taken: choose a free one with {flag}"
        if getattr(error, "errno", None) == errno.EACCES:
            raise ConfigError(f"port {port} of rank 0 is for root alone; set MASTER_PORT to 1024 or more") from None
        sentence = f"{what} ({reason}); look at the other ranks' logs, MASTER_ADDR, MASTER_PORT and firewalls"
        raise PeerLost(sentence, local=place.local_rank == 0) from None  # one sentence per host
    if verdict:
        raise ConfigError(verdict)


def _meeting_store(place: Place, address: str, port: int, seconds: float) -> Any:
    """Store in which ranks exchange their addresses. On one host no other can reach it; one rank needs none."""
    if place.world_size == 1:
        return dist.HashStore()
    agent = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, which ends with it
        agent, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        port = 0 if place.rank == 0 else int(agent.get("port"))
    if only_this_host(address) and "lo" in (name for _, name in socket.if_nameindex()):
        # gloo by itself takes the interface of the host's name, which other hosts reach (docs/security.md).
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = open_store(address, port, place.rank == 0, seconds)
    if agent is not None and place.rank == 0:
        agent.set("port", str(store.port))
    # Rank 0 waits for all here, so that a missing one is found within ``seconds``, and not by the backend later.
    if place.rank == 0:
        store.multi_get([f"here{rank}" for rank in range(1, place.world_size)])
    else:
        store.set(f"here{place.rank}", "1")
    return store


def open_store(address: str, port: int, serve: bool, seconds: float) -> Any:
    """A ``TCPStore`` at a port (0: a free one), which listens on loopback alone where ``address`` is that.

    Raises:
        RuntimeError, OSError: the port is taken, or nobody answers within ``seconds``.
    """
    more: dict[str, Any] = {"timeout": timedelta(seconds=seconds), "wait_for_workers": False}
    if serve and only_this_host(address):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        # A TCPStore by itself listens on all interfaces, and whoever reaches it may write to it.
        with socket.socket(family) as listening:
            # Connections of a run that has just ended may still hold the port (TIME_WAIT).
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((address, port))
            listening.listen(_BACKLOG)
            port = listening.getsockname()[1]
            # Detached: the store owns the descriptor from here on, which Python would close.
            more["master_listen_fd"] = listening.detach()
    return dist.TCPStore(address, port, is_master=serve, **more)


def _in_time(call: Callable[[], Any], seconds: float) -> Any:
    """Value of a call, made in a thread: the resolver of names and some of PyTorch's waits know no limit.

    Raises:
        TimeoutError: it took longer.
    """
    found: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            found.put((call(), None))
        except Exception as error:
            found.put((None, error.with_traceback(None)))  # which would keep a store, and its thread, alive

    # A daemon: a call that never returns must not keep the process from ending.
    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    try:
        value, error = found.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _compare_devices(store: Any, place: Place, here: Seat) -> str:
    """A sentence on why the ranks cannot run on their devices, the same on all of them; empty if they can."""
    if place.world_size == 1:
        return contradiction([here]) or ""
    store.set(f"seat{place.rank}", json.dumps(asdict(here)))
    if place.rank == 0:
        found = store.multi_get([f"seat{rank}" for rank in range(place.world_size)])
        verdict = contradiction([Seat(**json.loads(text)) for text in found]) or ""
        store.set("seats", verdict)
        if verdict:  # rank 0 carries the store: the others read the verdict before it leaves
            with suppress(RuntimeError):
                store.multi_get([f"seen{rank}" for rank in range(1, place.world_size)])
        return verdict
    verdict = store.get("seats").decode()
    store.set(f"seen{place.rank}", "1")
    return verdict


def _start_backend(backend: str, place: Place, device: torch.device, store: Any) -> None:
    # A bound device makes NCCL connect now, and not to GPU 0 of every rank; a single rank has nobody to connect to.
    bound = device if backend == "nccl" and place.world_size > 1 else None
    try:
        # Lost ranks are the watchdog's; this limit (DEEPSPEED_TIMEOUT) ends the wait for one that computes for ever.
        dist.init_process_group(
            backend,
            timeout=default_pg_timeout,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            device_id=bound,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: PyTorch has NCCL, and no GPU
        if backend != "nccl":
            raise
        raise ConfigError(
            f"NCCL does not start on rank {place.rank} ({device} of {socket.gethostname()}): "
            f"{reason_of(error)}; run again with NCCL_DEBUG=INFO to see why, and try NCCL_SOCKET_IFNAME=(the "
            "network between the nodes), NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1",
            local=place.local_rank == 0,
        ) from None

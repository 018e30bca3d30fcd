"""A few threads that compute whole experts side by side on CPU.

An expert's product of a few dozen rows is too small to be cut over cores: the hand-over between threads costs as
much as the work. Whole experts on single threads need none, and what a thread computes does not depend on the others,
so results are the same whoever takes which expert.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

_pool: ThreadPoolExecutor | None = None
_pool_key: tuple[int, int] = (0, 0)


def run_experts(job: Callable[[int], None], rows_E: list[int]) -> None:
    """Call ``job(expert)`` once for every expert, largest first, on all of PyTorch's intra-op threads.

    Experts with more than a thread's fair share of the rows come first, one at a time, each on all threads; the rest
    are taken from a common list by single threads.
    """
    # Stable, so of equals the first: the order in which moe/expert_store.py reads experts must be this one.
    order = sorted(range(len(rows_E)), key=lambda expert: -rows_E[expert])
    threads = torch.get_num_threads()
    # Counters such as FlopCounterMode see only the thread they were started on.
    if threads == 1 or len(order) == 1 or torch._C._len_torch_dispatch_stack():
        for expert in order:
            job(expert)
        return
    share = sum(rows_E) / threads
    heavy = sum(rows > share for rows in rows_E)
    for expert in order[:heavy]:
        job(expert)
    _run_shared(job, order[heavy:], threads)


def run_shared(job: Callable[[int], None], sizes: list[int]) -> None:
    """Call ``job(index)`` once for every index of ``sizes``, largest first, each on one thread of PyTorch's."""
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    threads = torch.get_num_threads()
    if threads == 1 or len(order) < 2:
        for index in order:
            job(index)
    else:
        _run_shared(job, order, threads)


def _run_shared(job: Callable[[int], None], order: list[int], threads: int) -> None:
    left = iter(order)  # next() on a list iterator is atomic
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        # OpenMP keeps this number by thread: a helper that does not set it cuts each product over all cores.
        torch.set_num_threads(1)
        # Both modes belong to a thread, which starts with gradients on; leaving inference mode turns them on, too.
        with torch.inference_mode(inference), torch.no_grad():
            for expert in left:
                job(expert)

    helpers = _threads(threads - 1)
    futures = [helpers.submit(work) for _ in range(min(threads, len(order)) - 1)]
    try:
        work()
    finally:
        # After an error too: no helper begins another expert, and none is at work when the caller cleans up.
        for _ in left:
            pass
        wait(futures)
        # Not for this thread alone: PyTorch gives a new one the number that any thread set last.
        torch.set_num_threads(threads)
    for future in futures:
        future.result()


def _threads(count: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked child starts its own, for threads do not survive a fork."""
    global _pool, _pool_key
    if _pool is None or _pool_key != (os.getpid(), count):
        _pool, _pool_key = ThreadPoolExecutor(count, thread_name_prefix="experts"), (os.getpid(), count)
    return _pool

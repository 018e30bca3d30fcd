"""Health of the ranks: the slowest, the spread of their speeds, and the cost of the all-to-all.

Ranks wait for each other in collectives, so all steps last equally long; a slow rank is the one that waits least. The
meter times the calls of ``deepspeed.comm`` (which the engine, and our all-to-all, use) at the host: with gloo that is
the whole wait; on a GPU, where calls return early, only what the host waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist

from vqmoe_ds.runtime.ranks import Place

TIMED = (
    "all_reduce",
    "reduce",
    "broadcast",
    "barrier",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
)


class CommunicationMeter:
    """Sum of the time of collectives and of the bytes that leave this rank in all-to-alls, while ``counting``."""

    def __init__(self, place: Place, device: torch.device) -> None:
        self.place, self.device, self.counting = place, device, False
        self.waited = self.exchange_seconds = 0.0
        self.exchange_bytes = 0
        backend = deepspeed.comm.comm.cdb
        for name in TIMED:
            # From the class: on the object there may be the timers of an earlier session of this process.
            setattr(backend, name, self._timed(name, getattr(type(backend), name).__get__(backend)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            seconds = time.perf_counter() - started
            if not self.counting:
                return result
            self.waited += seconds
            if name == "all_to_all_single":
                self.exchange_seconds += seconds
                self.exchange_bytes += _bytes_sent(**kwargs)
            return result

        return timed

    def measure(self, seconds: float, steps: int) -> dict[str, Any]:
        """Figures of the interval since the last call, the same on all ranks; empty for a single rank.

        ``slowest_rank``: the one that waited least. ``step_time_spread``: how much longer it worked than the mean rank,
        as a share. ``all_to_all_bytes`` and ``all_to_all_seconds``: per step, bytes of all ranks that crossed to
        another one, and the mean time of a rank; of rows that travel while shared experts run, only their departure.

        Args:
            seconds: of the interval's steps on this rank.
            steps: their number.
        """
        here = [seconds - self.waited, self.exchange_seconds / steps, self.exchange_bytes / steps]
        self.waited = self.exchange_seconds = 0.0
        self.exchange_bytes = 0
        if self.place.world_size == 1:
            return {}
        mine = torch.tensor(here, dtype=torch.float64, device=self.device)
        all_R3 = mine.new_empty(self.place.world_size, 3)
        dist.all_gather_into_tensor(all_R3.view(-1), mine)
        worked_R = all_R3[:, 0]
        return {
            "slowest_rank": int(worked_R.argmax()),
            "step_time_spread": round(float(worked_R.max() / worked_R.mean().clamp(min=1e-9)) - 1, 4),
            "all_to_all_bytes": round(float(all_R3[:, 2].sum())),
            "all_to_all_seconds": round(float(all_R3[:, 1].mean()), 6),
        }


def health_line(row: dict[str, Any]) -> str:
    """The line for the terminal of a row with these figures."""
    busiest = max(row.get("busiest_expert", [1.0]))
    return (
        f"health: slowest rank {row['slowest_rank']} (worked {row['step_time_spread']:+.1%} against the mean) | "
        f"busiest expert {busiest:.2f} x the mean | all-to-all {row['all_to_all_bytes'] / 1e6:.2f} MB, "
        f"{row['all_to_all_seconds'] * 1e3:.1f} ms a step"
    )


def _bytes_sent(**call: Any) -> int:
    # By name, as ``deepspeed.comm.all_to_all_single`` hands them to the backend.
    rows, splits = call["input"], call.get("input_split_sizes")
    group = call.get("group")
    if splits is None:
        share = 1 - 1 / dist.get_world_size(group)
        return int(rows.numel() * rows.element_size() * share)
    to_others = sum(splits) - splits[dist.get_rank(group)]
    return int(to_others * math.prod(rows.shape[1:]) * rows.element_size())

#!/usr/bin/env python
"""Start the ranks of one node with torchrun, as the one task that SLURM starts there (``VQMOE_LAUNCH=torchrun``).

    srun --ntasks-per-node=1 python launchers/slurm/node.py --nproc_per_node 8 launchers/pretrain.py ...

torchrun by itself dies of the signal before the time limit, and ends with 1 whatever its ranks ended with; here signals
go on to the ranks, and the exit code is that of the rank that failed first.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vqmoe_ds.runtime.errors import TRY_AGAIN, reports_errors
from vqmoe_ds.runtime.ranks import find_place


@reports_errors
def main(arguments: list[str]) -> int:
    """Run torchrun with this node's place among the nodes; the exit code."""
    node = find_place()
    del os.environ["LOCAL_SIZE"]  # that of the nodes' tasks, which the ranks would inherit
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _pass_on)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # torchrun sets handlers of its own for the signals named there, in place of those above.
    place = ["--nnodes", str(node.world_size), "--node_rank", str(node.rank), "--signals_to_handle", "SIGINT"]
    meeting = ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    try:
        run(parse_args([*place, *meeting, *arguments]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        # A rank that a signal killed has a negative code; as a shell's it is over 128, which common.sh requeues.
        return code if code >= 0 else 128 - code
    return 0


def _pass_on(number: int, frame: Any) -> None:
    """Pass a signal on to the ranks, this process's only children: each has a session that SLURM's did not reach."""
    me = os.getpid()
    ranks = Path(f"/proc/{me}/task/{me}/children").read_text(encoding="utf-8").split()
    if not ranks:  # that have anything to save
        os._exit(TRY_AGAIN)
    for rank in ranks:
        os.kill(int(rank), number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

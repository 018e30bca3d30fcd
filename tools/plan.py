#!/usr/bin/env python
"""Plan a training before a cluster is booked: memory, traffic and step time of every layout (docs/planning.md).

    python tools/plan.py --preset 64e --nodes 2 --gpus_per_node 8 --gpu h100
    python tools/plan.py --preset 256e --nodes 16 --gpu h100 --zero 2 3 --ep_size 8 64 --figure plan.png
    python tools/plan.py --preset 128e --nodes 4 --gpu a100-40 --offload --network_gbps 25 --json plan.json

Memory of weights, gradients and optimizer, and the bytes of all-to-all and all-reduce, are those of real runs
(tests/planning); time is a model that orders layouts, and its assumptions are printed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.planning.command import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

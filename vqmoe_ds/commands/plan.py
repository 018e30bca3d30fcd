"""Plan a training before a cluster is booked: memory, traffic and step time of every layout (docs/planning.md).

    vqmoe-plan --preset 64e --nodes 2 --gpus_per_node 8 --gpu h100
    vqmoe-plan --preset 256e --nodes 16 --gpu h100 --zero 2 3 --ep_size 8 64 --figure plan.png
    vqmoe-plan --preset 128e --nodes 4 --gpu a100-40 --offload --network_gbps 25 --json plan.json

Memory of weights, gradients and optimizer, and the bytes of all-to-all and all-reduce, are those of real runs
(tests/planning); time is a model that orders layouts, and its assumptions are printed.
"""

import sys

from vqmoe_ds.commands import command

main = command("planning.command", __doc__, cpu=True)

if __name__ == "__main__":
    sys.exit(main())

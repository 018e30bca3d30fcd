"""Show what a checkpoint holds: layout, sizes, health of codes and experts (docs/checkpoints.md).

vqmoe-inspect-checkpoint runs/pretrain
vqmoe-inspect-checkpoint runs/pretrain --verify --json
vqmoe-inspect-checkpoint runs/one runs/two              # and how the second differs
"""

import sys

from vqmoe_ds.commands import command

main = command("checkpoint.inspect", __doc__)

if __name__ == "__main__":
    sys.exit(main())

"""Convert any checkpoint to any layout or format (docs/checkpoints.md). It finds out by itself what SRC is.

    vqmoe-convert runs/pretrain run.portable --to portable
    vqmoe-convert runs/pretrain moved --to deepspeed --zero 3 --ep 4 --world 8
    vqmoe-convert runs/pretrain small --to discrete-only
    vqmoe-convert runs/pretrain my-model --to hf

Resuming on another layout needs no conversion: pretrain.py --resume takes a checkpoint of any.
"""

import os
import sys

from vqmoe_ds.commands import importing, run


def main() -> int:
    """Run the command that was given; the exit code."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU
    with importing():
        from vqmoe_ds.checkpoint import convert

    return run(convert, __doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Convert any checkpoint to any layout or format (docs/checkpoints.md). It finds out by itself what SRC is.

    vqmoe-convert runs/pretrain run.portable --to portable
    vqmoe-convert runs/pretrain moved --to deepspeed --zero 3 --ep 4 --world 8
    vqmoe-convert runs/pretrain small --to discrete-only
    vqmoe-convert runs/pretrain my-model --to hf

Resuming on another layout needs no conversion: pretrain.py --resume takes a checkpoint of any.
"""

import sys

from vqmoe_ds.commands import command

main = command("checkpoint.convert", __doc__, cpu=True)

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Convert any checkpoint to any layout or format (docs/checkpoints.md). What SRC is, it finds out by itself.

    python tools/convert_checkpoint.py runs/pretrain run.portable --to portable
    python tools/convert_checkpoint.py runs/pretrain moved --to deepspeed --zero 3 --ep 4 --world 8
    python tools/convert_checkpoint.py runs/pretrain small --to discrete-only
    python tools/convert_checkpoint.py runs/pretrain my-model --to hf

Resuming on another layout needs no conversion: pretrain.py --resume takes a checkpoint of any.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU

from vqmoe_ds.checkpoint.convert import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

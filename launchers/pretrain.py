#!/usr/bin/env python
"""Pretrain a Mixture-of-Experts language model routed by discrete codes.

    deepspeed launchers/pretrain.py
    deepspeed launchers/pretrain.py --data my_text/ --preset base --run_dir runs/mine
    deepspeed --num_gpus 2 launchers/pretrain.py --ep_size 2 --ds_config ds_configs/zero3.json
    python launchers/pretrain.py --ds_config ds_configs/zero3-ep8.json --preset 256e --dry_run --world_size 512

With no option at all it trains the preset `tiny` on the documentation that every Python carries. --help shows the
defaults of the preset that is named beside it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.config.cli import build_parser
from vqmoe_ds.planning import dry_run
from vqmoe_ds.train.pretrain import main

if __name__ == "__main__":
    arguments = build_parser(__doc__ or "").parse_args()
    sys.exit(dry_run.main(arguments) if arguments.dry_run else main(arguments))

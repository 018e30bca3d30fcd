#!/usr/bin/env python
"""Show what a checkpoint holds: layout, sizes, health of codes and experts (docs/checkpoints.md).

python tools/inspect_checkpoint.py runs/pretrain
python tools/inspect_checkpoint.py runs/pretrain --verify --json
python tools/inspect_checkpoint.py runs/one runs/two              # and how the second differs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.checkpoint.inspect import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

#!/usr/bin/env python
"""Report who is sent to which expert and code, and what becomes of it (docs/routing-report.md): HTML and JSON.

    python tools/inspect_routing.py runs/pretrain --out routing
    python tools/inspect_routing.py runs/pretrain --data my_text/ --out routing
    python tools/inspect_routing.py runs/pretrain/checkpoints/global_step0001000 \\
        --against runs/pretrain/checkpoints/global_step0000800 --out routing
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU

from vqmoe_ds.evaluation.routing_report import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

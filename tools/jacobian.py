#!/usr/bin/env python
"""Rank and spectrum of the averaged Jacobian of MoE layers, of several models on the same tokens: HTML and JSON.

    python tools/jacobian.py runs/vq runs/topk --data my_text/ --out jacobian

What is differentiated, and what the paper expects of it: docs/routing-report.md.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU

from vqmoe_ds.experiments.jacobian_report import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

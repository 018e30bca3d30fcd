#!/usr/bin/env python
"""Run a grid of routers, seeds and corpora, and report paired differences with confidence intervals (docs/results.md).

    python tools/compare_routers.py benchmarks/grids/routers.yaml --out runs/routers
    python tools/compare_routers.py benchmarks/grids/routers.yaml --out runs/routers --only 'top-2 balanced' --jobs 2
    python tools/compare_routers.py benchmarks/grids/routers.yaml --out runs/routers --list          # one line a run
    python tools/compare_routers.py benchmarks/grids/routers.yaml --out runs/routers --index $SLURM_ARRAY_TASK_ID
    python tools/compare_routers.py benchmarks/grids/routers.yaml --out runs/routers --report_only

The same command goes on after any interruption: finished runs are kept, killed ones resume from their checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.experiments.compare import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

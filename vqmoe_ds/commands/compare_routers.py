"""Run a grid of routers, seeds and corpora, and report paired differences with confidence intervals (docs/results.md).

    vqmoe-compare-routers benchmarks/grids/routers.yaml --out runs/routers
    vqmoe-compare-routers benchmarks/grids/routers.yaml --out runs/routers --only 'top-2 balanced' --jobs 2
    vqmoe-compare-routers benchmarks/grids/routers.yaml --out runs/routers --list          # one line a run
    vqmoe-compare-routers benchmarks/grids/routers.yaml --out runs/routers --index $SLURM_ARRAY_TASK_ID
    vqmoe-compare-routers benchmarks/grids/routers.yaml --out runs/routers --report_only

The same command goes on after any interruption: finished runs are kept, killed ones resume from their checkpoint.
"""

import sys

from vqmoe_ds.commands import command

main = command("experiments.compare", __doc__)

if __name__ == "__main__":
    sys.exit(main())

"""Rank and spectrum of the averaged Jacobian of MoE layers, of several models on the same tokens: HTML and JSON.

    vqmoe-jacobian runs/vq runs/topk --data my_text/ --out jacobian

What is differentiated, and what the paper expects of it: docs/routing-report.md.
"""

import os
import sys

from vqmoe_ds.commands import importing, run


def main() -> int:
    """Run the command that was given; the exit code."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU
    with importing():
        from vqmoe_ds.experiments import jacobian_report

    return run(jacobian_report, __doc__)


if __name__ == "__main__":
    sys.exit(main())

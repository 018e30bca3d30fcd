"""Report who is sent to which expert and code, and what becomes of it (docs/routing-report.md): HTML and JSON.

    vqmoe-inspect-routing runs/pretrain --out routing
    vqmoe-inspect-routing runs/pretrain --data my_text/ --out routing
    vqmoe-inspect-routing runs/pretrain/checkpoints/global_step0001000 \\
        --against runs/pretrain/checkpoints/global_step0000800 --out routing
"""

import os
import sys

from vqmoe_ds.commands import importing, run


def main() -> int:
    """Run the command that was given; the exit code."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU
    with importing():
        from vqmoe_ds.evaluation import routing_report

    return run(routing_report, __doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Rank and spectrum of the averaged Jacobian of MoE layers, of several models on the same tokens: HTML and JSON.

    vqmoe-jacobian runs/vq runs/topk --data my_text/ --out jacobian

What is differentiated, and what the paper expects of it: docs/routing-report.md.
"""

import sys

from vqmoe_ds.commands import command

main = command("experiments.jacobian_report", __doc__, cpu=True)

if __name__ == "__main__":
    sys.exit(main())

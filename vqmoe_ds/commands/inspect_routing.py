"""Report who is sent to which expert and code, and what becomes of it (docs/routing-report.md): HTML and JSON.

    vqmoe-inspect-routing runs/pretrain --out routing
    vqmoe-inspect-routing runs/pretrain --data my_text/ --out routing
    vqmoe-inspect-routing runs/pretrain/checkpoints/global_step0001000 \\
        --against runs/pretrain/checkpoints/global_step0000800 --out routing
"""

import sys

from vqmoe_ds.commands import command

main = command("evaluation.routing_report", __doc__, cpu=True)

if __name__ == "__main__":
    sys.exit(main())

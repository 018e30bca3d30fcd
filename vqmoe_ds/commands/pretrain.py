"""Pretrain a Mixture-of-Experts language model routed by discrete codes.

    deepspeed --no_python vqmoe-pretrain
    deepspeed --no_python vqmoe-pretrain --data my_text/ --preset base --run_dir runs/mine
    deepspeed --num_gpus 2 --no_python vqmoe-pretrain --ep_size 2 --ds_config ds_configs/zero3.json
    vqmoe-pretrain --ds_config ds_configs/zero3-ep8.json --preset 256e --dry_run --world_size 512

With no option at all it trains the preset `tiny` on the documentation that every Python carries. --help shows the
defaults of the preset that is named beside it.
"""

import sys

from vqmoe_ds.commands import usage
from vqmoe_ds.runtime.leaving import hear_early


def main() -> int:
    """Run the command that was given; the exit code."""
    if "--dry_run" not in sys.argv:  # which is a command of one process, and stops as those do
        hear_early()
    # Imports take seconds, in which a signal must already be heard.
    from vqmoe_ds.config.cli import build_parser
    from vqmoe_ds.planning import dry_run
    from vqmoe_ds.runtime.terminal import run_tool
    from vqmoe_ds.train import pretrain

    arguments = build_parser(usage(__doc__)).parse_args()
    return run_tool(lambda: dry_run.main(arguments)) if arguments.dry_run else pretrain.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

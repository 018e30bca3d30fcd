"""Score text with a trained model, clean and damaged (docs/evaluation.md).

    vqmoe-evaluate runs/pretrain                                     # the run's own held-out text
    vqmoe-evaluate runs/pretrain --data wiki.test.tokens --stride 64
    vqmoe-evaluate runs/pretrain --corruptions all --seeds 3 --json figures.json
    deepspeed --num_gpus 2 --no_python vqmoe-evaluate runs/pretrain --ep_size 2 --corrupt word_swap:0.05

CHECKPOINT is a run folder, a DeepSpeed checkpoint of any layout, a portable, Hugging Face or Megatron folder.
"""

import sys

from vqmoe_ds.commands import usage
from vqmoe_ds.runtime.leaving import hear_early


def main() -> int:
    """Run the command that was given; the exit code."""
    hear_early("nothing was written; start it again")
    # Imports take seconds, in which a signal must already be heard.
    from vqmoe_ds.evaluation import command

    return command.main(command.build_parser(usage(__doc__)).parse_args())


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tune a pretrained model on labelled texts or on plain text of another domain (docs/finetuning.md).

    deepspeed --no_python vqmoe-finetune --checkpoint runs/pretrain --task sst2
    deepspeed --no_python vqmoe-finetune --checkpoint runs/pretrain --task sst2=data/sst2 --seeds 3 --shots 1,4,16,64
    deepspeed --no_python vqmoe-finetune --checkpoint runs/pretrain --task reviews.csv --set finetune.trainable=all
    deepspeed --no_python vqmoe-finetune --checkpoint runs/pretrain --task lm --data other_text/ --train_steps 500

A VQMoE model keeps its discrete path alone: continuous router and gate go, codebook and quantizer are frozen.
model, moe, router and codebook are as in the checkpoint; --print_config shows them.
"""

import sys

from vqmoe_ds.commands import usage
from vqmoe_ds.runtime.leaving import hear_early


def main() -> int:
    """Run the command that was given; the exit code."""
    hear_early()
    # Imports take seconds, in which a signal must already be heard.
    from vqmoe_ds.finetune import cli, run

    return run.main(cli.build_parser(usage(__doc__)).parse_args())


if __name__ == "__main__":
    sys.exit(main())

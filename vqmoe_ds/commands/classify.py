"""Classify new texts with a fine-tuned model (docs/finetuning.md): a JSON line with label and probability for each.

    vqmoe-classify runs/finetune --text "a warm, funny film" "dull"
    vqmoe-classify runs/finetune --file texts.jsonl > labels.jsonl

CHECKPOINT is the run folder of a fine-tuning on labelled texts, or one of its checkpoints.
"""

import os
import sys

from vqmoe_ds.commands import importing, run


def main() -> int:
    """Run the command that was given; the exit code."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU
    with importing():
        from vqmoe_ds.finetune import predict

    return run(predict, __doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Classify new texts with a fine-tuned model (docs/finetuning.md): a JSON line with label and probability for each.

    vqmoe-classify runs/finetune --text "a warm, funny film" "dull"
    vqmoe-classify runs/finetune --file texts.jsonl > labels.jsonl

CHECKPOINT is the run folder of a fine-tuning on labelled texts, or one of its checkpoints.
"""

import sys

from vqmoe_ds.commands import command

main = command("finetune.predict", __doc__, cpu=True)

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Classify new texts with a fine-tuned model (docs/finetuning.md): a JSON line with label and probability for each.

    python tools/classify.py runs/finetune --text "a warm, funny film" "dull"
    python tools/classify.py runs/finetune --file texts.jsonl > labels.jsonl

CHECKPOINT is the run folder of a fine-tuning on labelled texts, or one of its checkpoints.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU

from vqmoe_ds.finetune.predict import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

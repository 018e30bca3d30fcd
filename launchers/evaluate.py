#!/usr/bin/env python
"""Score text with a trained model, clean and damaged (docs/evaluation.md).

    python launchers/evaluate.py runs/pretrain                                     # the run's own held-out text
    python launchers/evaluate.py runs/pretrain --data wiki.test.tokens --stride 64
    python launchers/evaluate.py runs/pretrain --corruptions all --seeds 3 --json figures.json
    deepspeed --num_gpus 2 launchers/evaluate.py runs/pretrain --ep_size 2 --corrupt word_swap:0.05

CHECKPOINT is a run folder, a DeepSpeed checkpoint of any layout, a portable, Hugging Face or Megatron folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.evaluation.command import build_parser, main

if __name__ == "__main__":
    sys.exit(main(build_parser(__doc__ or "").parse_args()))

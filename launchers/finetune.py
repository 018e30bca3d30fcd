#!/usr/bin/env python
"""Fine-tune a pretrained model on labelled texts or on plain text of another domain (docs/finetuning.md).

    deepspeed launchers/finetune.py --checkpoint runs/pretrain --task sst2
    deepspeed launchers/finetune.py --checkpoint runs/pretrain --task sst2=data/sst2 --seeds 3 --shots 1,4,16,64
    deepspeed launchers/finetune.py --checkpoint runs/pretrain --task reviews.csv --set finetune.trainable=all
    deepspeed launchers/finetune.py --checkpoint runs/pretrain --task lm --data other_text/ --train_steps 500

A VQMoE model keeps its discrete path alone: continuous router and gate go, codebook and quantizer are frozen.
model, moe, router and codebook are as in the checkpoint; --print_config shows them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.finetune.cli import build_parser
from vqmoe_ds.finetune.run import main

if __name__ == "__main__":
    sys.exit(main(build_parser(__doc__ or "").parse_args()))

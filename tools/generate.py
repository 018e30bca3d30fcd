#!/usr/bin/env python
"""Write text with a trained model, as it comes (docs/generation.md).

    python tools/generate.py runs/pretrain --prompt "The method returns" --tokens 300
    python tools/generate.py runs/pretrain --prompt "The " --temperature 0              # always the likeliest token
    python tools/generate.py runs/pretrain --top_p 0.9 --seed 7                         # asks for prompts
    python tools/generate.py runs/pretrain < beginning.txt > rest.txt

CHECKPOINT is a run folder, a DeepSpeed checkpoint of any layout, a portable, Hugging Face or Megatron folder. Standard
output holds the prompt and what follows it; of standard input the last line break is left off.

Text longer than the context the model was trained with: where prompt and text outgrow it, the model goes on from the
last half of that context (the key-value cache is filled anew from it), so that every later token is drawn from half a
context or more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.evaluation.generate_command import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

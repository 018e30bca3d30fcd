#!/usr/bin/env python
"""Make a VQMoE of a dense Hugging Face model of the Llama family, its MLPs copied as experts, or of a Mixtral, OLMoE or
Qwen3-MoE, codes in its router's place (docs/huggingface.md).

    python tools/upcycle.py llama/ start/                                               # vq with top_k 2, 8 experts
    python tools/upcycle.py llama/ start/ --set moe.top_k=0 --set moe.num_experts=16    # discrete codes alone
    python tools/upcycle.py llama/ start/ --set moe.router=topk --granularity 4         # 32 quarters of MLPs, 8 a token
    python tools/upcycle.py olmoe/ start/ --calibration text.txt                        # its experts, each with a code

Of a dense model the new one computes the function until it is trained; --noise gives that up.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.runtime.terminal import run_tool
from vqmoe_ds.upcycle.dense import build_parser, main

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

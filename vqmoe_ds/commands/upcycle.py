"""Make a VQMoE of a dense Hugging Face model of the Llama family, its MLPs copied as experts, or of a Mixtral, OLMoE or
Qwen3-MoE, codes in its router's place (docs/huggingface.md).

    vqmoe-upcycle llama/ start/                                               # vq with top_k 2, 8 experts
    vqmoe-upcycle llama/ start/ --set moe.top_k=0 --set moe.num_experts=16    # discrete codes alone
    vqmoe-upcycle llama/ start/ --set moe.router=topk --granularity 4         # 32 quarters of MLPs, 8 a token
    vqmoe-upcycle olmoe/ start/ --calibration text.txt                        # its experts, each with a code

Of a dense model the new one computes the function until it is trained; --noise gives that up.
"""

import sys

from vqmoe_ds.commands import command

main = command("upcycle.command", __doc__)

if __name__ == "__main__":
    sys.exit(main())

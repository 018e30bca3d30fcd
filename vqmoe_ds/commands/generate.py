"""Write text with a trained model, as it comes (docs/generation.md).

    vqmoe-generate runs/pretrain --prompt "The method returns" --tokens 300
    vqmoe-generate runs/pretrain --prompt "The " --temperature 0              # always the likeliest token
    vqmoe-generate runs/pretrain --top_p 0.9 --seed 7                         # asks for prompts
    vqmoe-generate runs/pretrain < beginning.txt > rest.txt

CHECKPOINT is a run folder, a DeepSpeed checkpoint of any layout, a portable, Hugging Face or Megatron folder. Standard
output holds the prompt and what follows it; of standard input the last line break is left off.

Text longer than the context the model was trained with: where prompt and text outgrow it, the model goes on from the
last half of that context (the key-value cache is filled anew from it), so that every later token is drawn from half a
context or more.
"""

import sys

from vqmoe_ds.commands import command

main = command("evaluation.generate_command", __doc__)

if __name__ == "__main__":
    sys.exit(main())

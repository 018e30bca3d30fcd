"""Make a table from token ids to experts: balanced by frequency, of embeddings, or of the codes or routes of a run.

    vqmoe-make-token-table runs/pretrain --experts 16 --layers 4 --data my_text/ --out table.safetensors
    vqmoe-make-token-table hf/model --experts 64 --layers 24 --data corpus/train --out table.safetensors
    vqmoe-make-token-table --method random --tokenizer my.tokenizer --experts 16 --layers 4 --data my_text/ \\
        --out table.safetensors
    vqmoe-make-token-table runs/tokens --method codes --form gate --out gates.safetensors
    vqmoe-make-token-table runs/topk --method routes --data my_text/ --out table.safetensors

Train with one: --set moe.router=token_table --set router.path=table.safetensors (docs/token-tables.md).
"""

import sys

from vqmoe_ds.commands import command

main = command("experiments.token_table", __doc__, cpu=True)

if __name__ == "__main__":
    sys.exit(main())

"""Make a table from token ids to experts: balanced by frequency, of a model's embeddings or of a run's codes.

    vqmoe-make-token-table runs/pretrain --experts 16 --layers 4 --data my_text/ --out table.safetensors
    vqmoe-make-token-table hf/model --experts 64 --layers 24 --data corpus/train --out table.safetensors
    vqmoe-make-token-table --method random --tokenizer my.tokenizer --experts 16 --layers 4 --data my_text/ \\
        --out table.safetensors
    vqmoe-make-token-table runs/tokens --method codes --form gate --out gates.safetensors

Train with one: --set moe.router=token_table --set router.path=table.safetensors (docs/token-tables.md).
"""

import sys

from vqmoe_ds.commands import command

main = command("experiments.token_table", __doc__, cpu=True)

if __name__ == "__main__":
    sys.exit(main())

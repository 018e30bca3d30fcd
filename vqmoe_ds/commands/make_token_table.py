"""Make a table from token ids to experts: balanced by frequency, of a model's embeddings or of a run's codes.

    vqmoe-make-token-table runs/pretrain --experts 16 --layers 4 --data my_text/ --out table.safetensors
    vqmoe-make-token-table hf/model --experts 64 --layers 24 --data corpus/train --out table.safetensors
    vqmoe-make-token-table --method random --tokenizer my.tokenizer --experts 16 --layers 4 --data my_text/ \\
        --out table.safetensors
    vqmoe-make-token-table runs/tokens --method codes --form gate --out gates.safetensors

Train with one: --set moe.router=token_table --set router.path=table.safetensors (docs/token-tables.md).
"""

import os
import sys

from vqmoe_ds.commands import importing, run


def main() -> int:
    """Run the command that was given; the exit code."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU
    with importing():
        from vqmoe_ds.experiments import token_table

    return run(token_table, __doc__)


if __name__ == "__main__":
    sys.exit(main())

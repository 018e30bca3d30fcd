"""Show what prepared data holds, and find what is wrong with it (docs/data.md).

vqmoe-inspect-data data/english
vqmoe-inspect-data data/english --verify --json
vqmoe-inspect-data megatron_text_document --tokenizer spm.model     # made by Megatron's own tools
"""

import sys

from vqmoe_ds.commands import command

main = command("data.inspect", __doc__)

if __name__ == "__main__":
    sys.exit(main())

"""Prepare text for training: tokenize it and write Megatron's indexed files (docs/data.md).

    vqmoe-prepare my_text/ --output data/mine
    vqmoe-prepare 'crawl/*.jsonl.gz' --tokenizer english.tokenizer --output data/crawl --workers 8
    mpirun -n 8 vqmoe-prepare recipe:enwiki-mini --output data/wiki

A command that was interrupted goes on from what it had finished when it is given again.
"""

import sys

from vqmoe_ds.commands import command

main = command("data.prepare", __doc__)

if __name__ == "__main__":
    sys.exit(main())

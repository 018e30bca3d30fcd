#!/usr/bin/env python
"""Prepare text for training: tokenize it and write Megatron's indexed files (docs/data.md).

    python tools/prepare_data.py my_text/ --output data/mine
    python tools/prepare_data.py 'crawl/*.jsonl.gz' --tokenizer english.tokenizer --output data/crawl --workers 8
    mpirun -n 8 python tools/prepare_data.py recipe:enwiki-mini --output data/wiki

A command that was interrupted goes on from what it had finished when it is given again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.data.prepare import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

#!/usr/bin/env python
"""Show what prepared data holds, and find what is wrong with it (docs/data.md).

python tools/inspect_data.py data/english
python tools/inspect_data.py data/english --verify --json
python tools/inspect_data.py megatron_text_document --tokenizer spm.model     # made by Megatron's own tools
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.data.inspect import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

#!/usr/bin/env python
"""One table of the fine-tunings of several models, differences taken seed by seed (docs/finetuning.md).

    python tools/compare_finetuned.py vq=runs/sst2-vq top-2=runs/sst2-top2 dense=runs/sst2-dense
    python tools/compare_finetuned.py vq=runs/sst2-vq vq=runs/imdb-vq top-2=runs/sst2-top2 top-2=runs/imdb-top2 \
        --bag_of_words figures.json --out report

A folder holds one run, or those of --seeds and --shots. The first name is the model that the others are held against.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.experiments.finetuned import build_parser, main
from vqmoe_ds.runtime.terminal import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(build_parser(__doc__ or "").parse_args())))

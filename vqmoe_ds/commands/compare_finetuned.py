"""One table of the fine-tunings of several models, differences taken seed by seed (docs/finetuning.md).

    vqmoe-compare-finetuned vq=runs/sst2-vq top-2=runs/sst2-top2 dense=runs/sst2-dense
    vqmoe-compare-finetuned vq=runs/sst2-vq vq=runs/imdb-vq top-2=runs/sst2-top2 top-2=runs/imdb-top2 \
        --bag_of_words figures.json --out report

A folder holds one run, or those of --seeds and --shots. The first name is the model that the others are held against.
"""

import sys

from vqmoe_ds.commands import command

main = command("experiments.finetuned", __doc__)

if __name__ == "__main__":
    sys.exit(main())

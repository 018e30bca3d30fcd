"""Compare the routes of two ways to run a model: precisions, caches, exports, older policies (docs/routes.md).

vqmoe-compare-routes runs/pretrain                                       # bf16, and decoding with a cache
vqmoe-compare-routes runs/pretrain --ways bf16 cached hf --data my_text/ --figure routes.png
vqmoe-compare-routes runs/pretrain runs/pretrain/checkpoints/global_step0000990  # a policy ten steps older
vqmoe-compare-routes runs/pretrain rollout.jsonl                         # routes that an inference engine recorded
"""

import sys

from vqmoe_ds.commands import command

main = command("experiments.routes", __doc__, cpu=True)

if __name__ == "__main__":
    sys.exit(main())

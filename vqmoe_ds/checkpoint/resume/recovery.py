"""The script that a checkpoint folder carries, as DeepSpeed's carry one: weights as one float32 state in safetensors.

DeepSpeed's own ``zero_to_fp32.py`` ends with a ValueError on experts that are spread over ranks or sharded apart.
"""

from __future__ import annotations

from pathlib import Path

NAME = "zero_to_fp32.py"
# The noted folder is appended to sys.path, so that an installed package comes before it.
_SCRIPT = '''#!/usr/bin/env python
"""Write the float32 weights and optimizer states of a checkpoint in this folder as safetensors, whatever its layout.

    python zero_to_fp32.py CHECKPOINTS OUTPUT [--tag global_step0000012]

CHECKPOINTS is this folder; without --tag the newest checkpoint is taken, of a fine-tuning the one that validated best.
It needs vqmoe_ds: installed, or where it was when the checkpoint was written.
"""

import argparse
import os
import sys

sys.path.append({root!r})
os.environ.setdefault("DS_ACCELERATOR", "cpu")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint_dir", metavar="CHECKPOINTS")
parser.add_argument("output_dir", metavar="OUTPUT")
parser.add_argument("-t", "--tag", help="name of a checkpoint in the folder (default: as above)")
parser.add_argument("--safe_serialization", action="store_true", help="always so")
args = parser.parse_args()
try:
    from vqmoe_ds.checkpoint import convert
except ImportError:
    sys.exit("error: vqmoe_ds is not there any more; install it with pip (or set PYTHONPATH to its folder)")
source = os.path.join(args.checkpoint_dir, args.tag) if args.tag else args.checkpoint_dir
sys.exit(convert.main(convert.build_parser("").parse_args([source, args.output_dir, "--to", "portable"])))
'''


def write_script(folder: str) -> None:
    """Leave the script in a folder; in the place of ``DeepSpeedEngine._copy_recovery_script``."""
    path = Path(folder) / NAME
    path.write_text(_SCRIPT.format(root=str(Path(__file__).resolve().parents[2])), encoding="utf-8")
    path.chmod(0o755)

#!/usr/bin/env python
"""``vqmoe-completion`` from a checkout; ``--help`` says what it does."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # an installed package comes first

from vqmoe_ds.commands.completion import main

if __name__ == "__main__":
    sys.exit(main())

"""Show what prepared data holds, and find what is wrong with it (docs/data.md).

vqmoe-inspect-data data/english
vqmoe-inspect-data data/english --verify --json
vqmoe-inspect-data megatron_text_document --tokenizer spm.model     # made by Megatron's own tools
"""

import sys

from vqmoe_ds.commands import importing, run


def main() -> int:
    """Run the command that was given; the exit code."""
    with importing():
        from vqmoe_ds.data import inspect

    return run(inspect, __doc__)


if __name__ == "__main__":
    sys.exit(main())

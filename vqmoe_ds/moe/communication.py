"""Collectives of this package: DeepSpeed's where it is in use, so that its comms_logger sees them, else PyTorch's."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist


def comm() -> Any:
    """``deepspeed.comm`` once ``deepspeed.init_distributed`` has run, else ``torch.distributed``."""
    # Looked up and not imported: DeepSpeed takes seconds to import, and the layer works without it. `cdb` is set in the
    # inner module; deepspeed.comm holds a copy of its first value, None.
    started = getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None) is not None
    return sys.modules["deepspeed.comm"] if started else dist

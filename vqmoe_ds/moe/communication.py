"""Collectives of this package: DeepSpeed's where it is in use, so that its comms_logger sees them, else PyTorch's."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist


def comm() -> Any:
    """``deepspeed.comm`` once ``deepspeed.init_distributed`` has run, else ``torch.distributed``."""
    started = getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None) is not None
    return sys.modules["deepspeed.comm"] if started else dist

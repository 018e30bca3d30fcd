"""Sparse Mixture-of-Experts models routed by discrete codes (VQMoE), trained with DeepSpeed."""

import os
import sys

__version__ = "0.2.0"

# Idle OpenMP threads spin for milliseconds by default and take the cores from the threads that run the experts on CPU
# (moe/workers.py). OpenMP reads this when torch is first imported, so it is set here, before that.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

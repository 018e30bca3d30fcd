"""Sparse Mixture-of-Experts models routed by discrete codes (VQMoE), trained with DeepSpeed."""

__version__ = "0.1.0"

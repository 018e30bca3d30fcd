"""Compiled kernels for CPU: ``experts.cpp``, built once a machine and called through ctypes."""

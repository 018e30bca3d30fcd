"""Compiled kernels for CPU: ``experts.cpp``, built once per machine and called through ctypes."""

"""The checks of benchmarks/gpu.py, one module each; tests/gpu runs those that need no clock."""

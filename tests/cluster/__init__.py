"""Tests on a real SLURM cluster of virtual nodes (make test-cluster)."""

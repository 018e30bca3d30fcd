"""Run configuration and the check of the DeepSpeed JSON."""

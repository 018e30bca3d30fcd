"""Checkpoints seen as another model: the discrete path alone, adapters merged."""

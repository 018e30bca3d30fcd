"""Checkpoints of a running training: saved, sealed, kept, found and resumed."""

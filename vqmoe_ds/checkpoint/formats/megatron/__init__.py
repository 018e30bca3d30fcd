"""Megatron-LM's ``torch`` format."""

"""Mutated inputs: every byte of every input may be wrong, and each gets one sentence in little time and memory."""

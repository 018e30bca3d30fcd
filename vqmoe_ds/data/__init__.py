"""Text sources and batches."""

"""Validation, routing diagnostics and samples."""

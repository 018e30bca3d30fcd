"""Runs of a grid of routers and seeds, and statistics of their differences."""

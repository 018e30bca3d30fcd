"""Runs of a grid of routers and seeds, and what can be said of their differences."""

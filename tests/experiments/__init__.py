"""Grids, budgets, statistics and reports."""

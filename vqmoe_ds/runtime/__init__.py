"""Ranks, launchers, watchdog, lock, console, files and errors: under everything that runs."""

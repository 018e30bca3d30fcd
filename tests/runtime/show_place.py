"""Prints the place of this process in the run and where the ranks meet; started by real launchers in the tests."""

import os

from vqmoe_ds.runtime.ranks import find_place

if __name__ == "__main__":
    print(f"{find_place()} at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}\n", end="", flush=True)

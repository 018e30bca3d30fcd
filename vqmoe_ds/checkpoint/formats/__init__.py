"""One module or package per checkpoint format."""

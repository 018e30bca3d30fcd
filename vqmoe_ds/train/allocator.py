def tune_allocator() -> str | None:
    return None

"""Routers, codebooks, dispatch and experts."""

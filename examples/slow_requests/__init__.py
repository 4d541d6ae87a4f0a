"""Requests that end when they are too slow, or when nobody waits for them any more."""

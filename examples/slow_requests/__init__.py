"""Requests that end when they are too slow, or when their client disconnects."""

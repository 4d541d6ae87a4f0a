"""This package beside hand-written dependencies and others of its kind: `python -m tests.peers`."""

"""A comparison with hand-written dependencies and similar packages: `python -m tests.peers`."""

"""Tests that need more than one server: `make test-ha` runs them, and `make test` does not."""

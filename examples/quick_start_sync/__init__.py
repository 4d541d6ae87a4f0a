"""The smallest application with `def` endpoints and a synchronous engine."""

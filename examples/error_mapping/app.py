"""What `make example NAME=error_mapping` serves: the answers for a whole application."""

from examples.error_mapping.app_wide import create_app

__all__ = ["create_app"]

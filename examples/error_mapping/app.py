"""The application that `make example NAME=error_mapping` serves: app-wide mapping."""

from examples.error_mapping.app_wide import create_app

__all__ = ["create_app"]

"""HTTP responses for database failures, if the application asks for them.

No message of a database gets into a response. It stays in the `__cause__` and is logged once.
"""

from ._answers import http_errors, install_error_handlers, map_database_error
from ._formats import error_responses
from ._kinds import DatabaseErrorDescription, DatabaseErrorKind, describe_database_error
from ._rules import ErrorRule

__all__ = [
    "DatabaseErrorDescription",
    "DatabaseErrorKind",
    "ErrorRule",
    "describe_database_error",
    "error_responses",
    "http_errors",
    "install_error_handlers",
    "map_database_error",
]

"""Answer a database failure over HTTP, where the application asks for it.

Nothing that a database has said gets into a response. It is in the `__cause__`, and logged once.
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

"""For people who test applications: other engines, isolation, statements, failures, a client."""

from ._capture import CapturedStatement, CapturedStatements, capture_statements
from ._client import async_client
from ._faults import fail_next_checkout, fail_next_commit, fail_next_statement
from ._isolation import isolated
from ._outer import IsolationError
from ._overrides import override_database

__all__ = [
    "CapturedStatement",
    "CapturedStatements",
    "IsolationError",
    "async_client",
    "capture_statements",
    "fail_next_checkout",
    "fail_next_commit",
    "fail_next_statement",
    "isolated",
    "override_database",
]

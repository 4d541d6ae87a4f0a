"""Test tools: isolation, cloned databases, other engines, captured statements, failures."""

from ._capture import CapturedStatement, CapturedStatements, capture_statements
from ._client import async_client
from ._databases import Templates, cloned, override_database
from ._faults import fail_next_checkout, fail_next_commit, fail_next_statement
from ._isolation import isolated
from ._targets import IsolationError

__all__ = [
    "CapturedStatement",
    "CapturedStatements",
    "IsolationError",
    "Templates",
    "async_client",
    "capture_statements",
    "cloned",
    "fail_next_checkout",
    "fail_next_commit",
    "fail_next_statement",
    "isolated",
    "override_database",
]

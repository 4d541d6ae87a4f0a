"""A production checklist that queries the databases of an application."""

from ._asking import check_databases
from ._findings import Finding, FindingStatus, log_findings

__all__ = ["Finding", "FindingStatus", "check_databases", "log_findings"]

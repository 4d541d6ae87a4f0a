"""`python -m fastapi_sqlnative check main:app`: the checklist on the command line."""

import argparse
import asyncio
import dataclasses
import json
import pkgutil
import sys
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

from starlette.applications import Starlette

from .checklist import Finding, FindingStatus, check_databases
from .checklist._findings import FIXES, summary

_EPILOG = """\
exit status: 0; 1 if, with --strict, a row is neither ok nor accepted; 2 if the application cannot
be imported or has no database, an option is wrong, or a database does not answer
"""
_WELL = (FindingStatus.OK, FindingStatus.ACCEPTED)
# The subjects of rows that may be accepted. A database that does not answer may not.
_ACCEPTABLE = sorted(FIXES.keys() - {"answer"})


def main(arguments: list[str] | None = None) -> int:
    """Run the checklist, print the findings and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        findings = asyncio.run(_ask(options))
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())  # Pydantic's have several lines
        print(f"{options.app} cannot be checked: {why}", file=sys.stderr)
        raise SystemExit(2) from error
    if options.json:
        print(json.dumps([dataclasses.asdict(each) for each in findings], indent=2))
    else:
        print("\n".join(_table(findings)))
    if any(each.status is FindingStatus.NO_ANSWER for each in findings):
        return 2
    return int(options.strict and any(each.status not in _WELL for each in findings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fastapi_sqlnative", epilog=_EPILOG)
    add = parser.add_argument
    add("command", choices=["check"], help="ask an application's databases how they are set up")
    add("app", help="import string of the application, such as main:app")
    add("--factory", action="store_true", help="app is a function that makes it")
    add("--processes", type=int, default=1, help="serving processes, across all replicas (1)")
    add("--timeout", type=float, default=10.0, help="seconds for each database (10)")
    add(
        "--alembic",
        action="append",
        default=[],
        metavar="[NAME=]INI",
        help="an Alembic configuration, and the database that should be at its heads (those of "
        "the section of that name, if there is one)",
    )
    add(
        "--accept",
        action="append",
        default=[],
        type=_row,
        metavar="DATABASE:SUBJECT",
        help="a row to report as accepted",
    )
    add("--strict", action="store_true", help="fail on warnings")
    add("--json", action="store_true", help="print JSON")
    return parser


def _row(text: str) -> str:
    """Check that there is a row of this subject. Its database is checked once all have answered."""
    subject = text.rpartition(":")[2]
    if subject not in _ACCEPTABLE:
        known = ", ".join(_ACCEPTABLE)
        raise argparse.ArgumentTypeError(f"no row {subject!r} can be accepted; these can: {known}")
    return text


async def _ask(options: argparse.Namespace) -> list[Finding]:
    alembic = (each.rpartition("=") for each in options.alembic)
    findings = await check_databases(
        _application(options.app, options.factory),
        processes=options.processes,
        timeout=options.timeout,
        alembic={name or "default": path for name, _, path in alembic},
        progress=partial(print, file=sys.stderr, flush=True),
    )
    if not findings:
        raise LookupError("no database is installed on it. Call install_database(app, ...).")
    # A row about pools that share a server names several databases: any of them will do.
    known = {name for each in findings for name in _names(each)}
    if unknown := {each.rpartition(":")[0] for each in options.accept} - known:
        raise LookupError(f"--accept names {sorted(unknown)}, and installed are: {sorted(known)}.")
    return [
        dataclasses.replace(each, status=FindingStatus.ACCEPTED)
        if any(f"{name}:{each.subject}" in options.accept for name in _names(each))
        else each
        for each in findings
    ]


def _names(row: Finding) -> list[str]:
    return [row.database, *row.database.split(", ")]


def _application(place: str, factory: bool) -> Starlette:
    """Import the application, as uvicorn does."""
    found: Any = pkgutil.resolve_name(place if ":" in place else f"{place}:app")
    if factory and isinstance(found, Starlette):
        raise TypeError("this is an application, not a function. Leave out --factory.")
    app = found() if factory else found
    if not isinstance(app, Starlette):
        kind = type(app).__name__
        raise TypeError(f"this is a {kind}, not an application. Pass --factory if it makes one.")
    return app


def _table(findings: list[Finding]) -> Iterator[str]:
    wide = max((len(each.subject) for each in findings), default=0)
    for database, rows in groupby(findings, key=lambda each: each.database):
        yield database
        for row in rows:
            yield f"  {row.status:9}  {row.subject:{wide}}  {row.detail}"
            if row.fix and row.status not in _WELL:
                yield from (f"{'':13}{line}" for line in (row.fix, row.link))
    yield summary(findings)


if __name__ == "__main__":
    sys.exit(main())

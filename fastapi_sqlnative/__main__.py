"""`python -m fastapi_sqlnative check main:app`: the checklist on the command line."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from starlette.applications import Starlette

from .checklist import Finding, FindingStatus, check_databases

_EPILOG = """\
exit status: 0; 1 if, with --strict, a row is neither ok nor accepted; 2 if the application cannot
be imported, or a database does not answer
"""


def main(arguments: list[str] | None = None) -> int:
    """Ask, print what was found, and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        findings = asyncio.run(_ask(options))
    except Exception as error:
        traceback.print_exc()
        print(f"{options.app} could not be checked: see above.", file=sys.stderr)
        raise SystemExit(2) from error
    rows = [_Row(each, f"{each.database}:{each.subject}" in options.accept) for each in findings]
    if options.json:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        print("\n".join(_table(rows)))
    return _exit_status(rows, options.strict)


async def _ask(options: argparse.Namespace) -> list[Finding]:
    return await check_databases(
        _application(options.app, options.factory),
        processes=options.processes,
        timeout=options.timeout,
        alembic=dict(map(_named, options.alembic)),
        progress=partial(print, file=sys.stderr, flush=True),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fastapi_sqlnative")
    check = parser.add_subparsers(required=True, metavar="command").add_parser(
        "check",
        help="ask the databases of an application how they are set up",
        epilog=_EPILOG,
    )
    check.add_argument("app", help="where the application is, as in main:app")
    check.add_argument("--factory", action="store_true", help="app is a function that makes it")
    check.add_argument(
        "--processes", type=int, default=1, help="that serve it, all replicas together (1)"
    )
    check.add_argument("--timeout", type=float, default=10.0, help="seconds for each database (10)")
    check.add_argument(
        "--alembic",
        action="append",
        default=[],
        metavar="[NAME=]INI",
        help="an Alembic configuration, and the database that is to have its heads",
    )
    check.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="DATABASE:SUBJECT",
        help="a row that is meant to be so",
    )
    check.add_argument("--strict", action="store_true", help="fail for a warning")
    check.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _named(alembic: str) -> tuple[str, str]:
    name, _, path = alembic.rpartition("=")
    return name or "default", path


def _application(place: str, factory: bool) -> Starlette:
    """Import the application, as uvicorn does."""
    module, _, names = place.partition(":")
    found: Any = importlib.import_module(module)
    for name in (names or "app").split("."):
        found = getattr(found, name)
    app = found() if factory else found
    if not isinstance(app, Starlette):
        raise TypeError(f"{place} is {app!r}, no application. One made by a function: --factory.")
    return app


class _Row(NamedTuple):
    """A row of the checklist, and whether somebody has said that it is meant to be so."""

    finding: Finding
    accepted: bool

    @property
    def status(self) -> str:
        return "accepted" if self.accepted else self.finding.status

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self.finding) | {"status": self.status}


def _table(rows: list[_Row]) -> Iterator[str]:
    wide = max((len(row.finding.subject) for row in rows), default=0)
    for database, found in groupby(rows, key=lambda row: row.finding.database):
        yield database
        for row in found:
            yield f"  {row.status:9}  {row.finding.subject:{wide}}  {row.finding.detail}"
            if row.finding.fix and not row.accepted:
                yield from (f"{'':13}{line}" for line in (row.finding.fix, row.finding.link))
    counts = Counter(row.status for row in rows)
    yield ", ".join(f"{count} {status}" for status, count in counts.items()) or "no database"


def _exit_status(rows: list[_Row], strict: bool) -> int:
    statuses = {row.status for row in rows}
    if FindingStatus.NO_ANSWER in statuses:
        return 2
    return int(strict and not statuses <= {FindingStatus.OK, "accepted"})


if __name__ == "__main__":
    sys.exit(main())

"""The report of the findings, as JSON for machines and as Markdown for people."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.faults.run import Finding

PACKAGES = ("fastapi-sqlnative", "fastapi", "starlette", "sqlalchemy", "psycopg", "asyncpg")
SERVERS = ("uvicorn", "gunicorn")
COLUMNS = (
    *("fault", "driver", "served by", "acknowledged", "refused", "unknown (stored)", "recovered"),
    *("slowest error", "not ready after", "ready again", "logged"),
)


def write_report(
    folder: Path, findings: Sequence[Finding], *, seconds: float, postgres: str
) -> None:
    """Write `report.json` and `report.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "postgresql": postgres,
        **{name: importlib.metadata.version(name) for name in (*PACKAGES, *SERVERS)},
    }
    content = {**about, "promises": promises(findings), "faults": [*map(asdict, findings)]}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    parts = ["# Faults", ", ".join(f"{name} {value}" for name, value in about.items())]
    parts += [table(("promise", "figure"), promises(findings).items())]
    parts += [table(COLUMNS, map(row, findings)), answers(findings), "\n".join(broken(findings))]
    (folder / "report.md").write_text("\n\n".join(filter(None, parts)) + "\n", "utf-8")


def promises(findings: Sequence[Finding]) -> dict[str, str]:
    """Return a figure for each promise, over all faults."""
    acknowledged = sum(each.acknowledged for each in findings)
    refused = sum(each.refused for each in findings)
    recoveries = [each.recovery for each in findings if each.recovery is not None]
    return {
        "acknowledged writes lost": f"{_count(each.lost for each in findings)} of {acknowledged}",
        "refused writes stored": f"{_count(each.lies for each in findings)} of {refused}",
        "registers inconsistent": str(_count(each.inconsistent for each in findings)),
        "leaks": str(_count(each.leaks for each in findings)),
        "readiness against the truth": f"{_count(each.wrong for each in findings)} wrong",
        "slowest recovery": f"{max(recoveries, default=0):.1f} s",
        "slowest error answer": f"{max(each.slowest_error for each in findings):.1f} s",
        "faults with a broken promise": f"{sum(map(bool, (each.broken for each in findings)))}",
    }


def row(found: Finding) -> Iterator[str]:
    """Yield the results of one fault, column by column."""
    yield from (found.scenario, found.driver, found.server)
    yield from (str(found.acknowledged), str(found.refused))
    yield f"{found.unknown} ({found.unknown_stored})"
    for seconds in (found.recovery, found.slowest_error or None, found.noticed, found.back):
        yield "" if seconds is None else f"{seconds:.1f} s"
    yield f"{found.logged / 1000:.1f} kB"


def broken(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield a line for each broken promise."""
    for each in findings:
        for sentence in each.broken:
            yield f"- **{each.scenario}**, {each.driver}, {each.server}: {sentence}"


def answers(findings: Sequence[Finding]) -> str:
    """Return a table of the answers during each fault, with their counts."""
    rows = (
        (each.scenario, "; ".join(f"{count} x {said}" for said, count in each.statuses.items()))
        for each in findings
    )
    return table(("fault", "answers"), rows)


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count(lists: Iterable[Sequence[str]]) -> int:
    return sum(map(len, lists))

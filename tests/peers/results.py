"""The results: figures by row and contestant, saved as JSON, with one file for each part."""

import importlib.metadata
import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from tests.peers.contestants import BY_HAND, OURS, installed

RESULTS = Path("dist/peers")
Part = Literal["cpu", "wire", "load", "load-sync", "databases"]
HIGHER_IS_BETTER = {"throughput"}


class TableKey(NamedTuple):
    """What a table shows."""

    measure: str
    engine: str
    workload: str


class Row(NamedTuple):
    """A row of figures to compare contestants by, which a table shows as a column.

    Attributes:
        measure: what was measured.
        engine: the driver and the colour.
        workload: the workload of the whole table, or empty if each column has its own.
        name: the name of the column.
    """

    measure: str
    engine: str
    workload: str
    name: str

    @property
    def table(self) -> TableKey:
        """Return the key of the table that the row belongs to."""
        return TableKey(*self[:3])

    @property
    def counted(self) -> bool:
        """Return whether the figures are counts, which have no ratios because many are zero."""
        return self.measure.partition(",")[0] in {"trips", "failed"}


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float


def spread(values: list[float]) -> Spread:
    """Summarize the values of several rounds."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass
class Results:
    """The figures of one part's run, in the order in which they were measured.

    Attributes:
        part: the name of the part.
        about: when and on what the part ran.
        figures: one value for each round, by row and contestant: seconds, answers per second,
            bytes or counts.
    """

    part: Part
    about: dict[str, str] = field(default_factory=dict)
    figures: dict[Row, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: Row, contestant: str, *values: float) -> None:
        """Add the values of one or more rounds."""
        self.figures.setdefault(row, {}).setdefault(contestant, []).extend(values)

    def median(self, row: Row, contestant: str) -> float:
        """Return the median of a contestant's rounds."""
        return statistics.median(self.figures[row][contestant])

    def reference(self, row: Row) -> str | None:
        """Return the name of the best hand-written dependency in a row."""
        medians = {name: self.median(row, name) for name in self.figures[row] if name in BY_HAND}
        best = max if row.measure in HIGHER_IS_BETTER else min
        return best(medians, key=medians.__getitem__) if medians else None

    def ratios(self, row: Row) -> dict[str, Spread]:
        """Return the ratios of all contestants to the reference, round by round."""
        by_hand = self.reference(row)
        if by_hand is None or row.counted:
            return {}
        base = self.figures[row][by_hand]
        return {
            name: spread([value / of for value, of in zip(values, base, strict=True)])
            for name, values in self.figures[row].items()
        }

    def tables(self) -> dict[TableKey, list[Row]]:
        """Return the columns of each table."""
        found: dict[TableKey, list[Row]] = {}
        for row in self.figures:
            found.setdefault(row.table, []).append(row)
        return found

    def ahead(self, row: Row) -> dict[str, bool]:
        """Return the contestants ahead of this package in a row, and whether in most rounds.

        Most means three of four. With fewer, another run may well have a different result.
        """
        found: dict[str, bool] = {}
        for name, values in self.figures[row].items():
            sign = -1 if row.measure in HIGHER_IS_BETTER else 1
            ours = self.figures[row][OURS]
            lead = spread([sign * (our - value) for our, value in zip(ours, values, strict=True)])
            if lead.median > 0:
                found[name] = lead.low > 0
        return found

    def save(self) -> Path:
        """Write the file of this part."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{self.part}.json"
        rows = [{**row._asdict(), "values": values} for row, values in self.figures.items()]
        path.write_text(json.dumps({**asdict(self), "figures": rows}, indent=1))
        return path


def load_results(part: Part) -> Results | None:
    """Read the file of a part, if there is one."""
    path = RESULTS / f"{part}.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    figures = {
        Row(each["measure"], each["engine"], each["workload"], each["name"]): each["values"]
        for each in kept["figures"]
    }
    return Results(part, kept["about"], figures)


def about(postgres: str) -> dict[str, str]:
    """Return when and on what a part runs."""
    packages = ("fastapi", "starlette", "sqlalchemy", "uvicorn", "psycopg", "asyncpg")
    peers = [each.package for each in installed() if each.package]
    versions = {each: importlib.metadata.version(each) for each in (*packages, *peers)}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "Python": platform.python_version(),
        "PostgreSQL": postgres,
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        **versions,
    }

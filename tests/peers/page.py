"""Writing `docs/performance-compared.md` and its charts from the kept results."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from tests.peers.charts import bar_chart
from tests.peers.contestants import BY_HAND, CONTESTANTS, LEFT_OUT, LIMIT, OUR_READER, OURS
from tests.peers.results import Part, Results, Row, TableKey, load_results

DOCS = Path("docs")
PAGE = DOCS / "performance-compared.md"
CHARTS = DOCS / "charts"

TITLES = {
    "cpu": "CPU of a request",
    "trips": "Round trips of a request",
    "throughput": "Requests a second, from twice as many as the hand-written dependency can serve",
    "p50": "Median latency, at twice as many",
    "p99": "The slowest of a hundred, at twice as many",
    "server CPU": "CPU of the server for a request",
    "p50, calm": "Median latency, at half as many",
    "p99, calm": "The slowest of a hundred, at half as many",
    "server CPU, calm": "CPU of the server for a request, at half as many",
    "failed": "Requests that failed",
    "failed, calm": "Requests that failed, at half as many",
    "memory": "Memory of the server",
    "start-up": "CPU until the server listens",
}
HEADINGS: dict[Part, tuple[str, str]] = {
    "cpu": (
        "What a request costs",
        "The application is called in the benchmark's own process, without HTTP: what is left is "
        "FastAPI, the package, SQLAlchemy and the driver.",
    ),
    "wire": (
        "What goes over the wire",
        "Questions to the database, each of which waits for its answer, counted by a proxy once "
        "the connection is there. They are numbers, not ratios.",
    ),
    "load": (
        "Under load",
        "uvicorn with one process, a pool of ten, and requests that are sent when they are due, "
        "whether or not others were answered; a latency counts from then. A column is so many "
        "connections, with so many milliseconds more to the database and back. What is called "
        "twice and half is measured against the hand-written dependency in the same minute. Some "
        "answer before they are done: the hand-written dependency in request scope rolls back "
        "after the response, and saves its client that round trip (`reader` needs none); what "
        "advanced-alchemy has answered is not stored yet.",
    ),
    "load-sync": (
        "Under load, synchronously",
        "The same with `def` endpoints, whose requests wait for FastAPI's forty threads too.",
    ),
    "databases": (
        "One, ten and a hundred databases",
        "So many are installed, the last of them is read from. Memory is the server's peak.",
    ),
}
# A ratio says little of what is nearly nothing, and a table that nobody reads costs the others.
DRAWN = {
    "cpu": ("one read", "three reads", "a committed write"),
    "throughput": ("64 at 0 ms", "64 at 1 ms", "64 at 5 ms"),
    "p99": ("512 at 0 ms", "512 at 1 ms", "512 at 5 ms"),
    "memory": ("1 database", "10 databases", "100 databases"),
}
INTRODUCTION = (
    "# Compared with other packages",
    "",
    "What does a request cost with this package, with the dependencies that people write by hand, "
    "and with other packages that bring SQLAlchemy sessions to FastAPI? `make benchmark-peers` "
    "measures it on your machine and writes this page. What a hand-written dependency does with "
    "a transaction is [another comparison](compared.md#side-by-side).",
    "",
    "Every application has the same routes and the same engines, and is built as its package's "
    "documentation says. The contestants take turns within each round. A figure is the ratio to "
    "the best hand-written dependency in the same round, the median of all rounds, with the "
    "quartiles in brackets: below 1 is cheaper, but for requests a second, of which more are "
    "better. Ratios hold for one run on one machine.",
    "",
    "- **By hand** is the tutorial's generator, in FastAPI's two scopes, where the endpoint "
    "commits; and one that wraps `begin()`.",
    "- **The limit** is a session opened inside the endpoint, with no dependency around it.",
    "- `reader` is this package's dependency for reads that need no transaction; `get_db` and "
    "`transactional` are measured as fastapi-sqlnative.",
    "- fastapi-async-sqlalchemy commits reads too. advanced-alchemy commits after the response "
    "has left.",
    "",
)
AHEAD = (
    "Contestants that were ahead of `get_db` (for reads) or `transactional` (for writes) in three "
    "of four rounds or more."
)
ABOUT_THE_RUN = {"date", "cores", "load", "rounds"}
BUSY = (
    "The machine was not quiet: when this began, its load was {load} on {cores} cores. Small "
    "differences say nothing then."
)
NAMES = [each.name for each in CONTESTANTS]


def kind_of(name: str) -> str:
    """Give the colour of a contestant's bars."""
    if name in (OURS, OUR_READER):
        return "ours"
    return "hand" if name in (*BY_HAND, LIMIT) else "other"


def cell(results: Results, row: Row, name: str) -> str:
    """Write what a table says of one contestant in one row."""
    values = results.figures[row].get(name)
    if values is None:
        return ""
    if row.counted:
        return f"{sum(values) if 'failed' in row.measure else values[0]:g}"
    low, median, high = results.ratios(row)[name]
    if len(values) == 1 or low == high:
        return f"{median:.2f}"
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def table(results: Results, rows: list[Row]) -> list[list[str]]:
    """Give a table's lines: the columns' names, then one for each contestant."""
    present = [name for name in NAMES if any(name in results.figures[row] for row in rows)]
    lines = [[name, *(cell(results, row, name) for row in rows)] for name in present]
    return [["", *(row.name for row in rows)], *lines]


def title_of(key: TableKey) -> str:
    """Say what a table shows."""
    return ": ".join(
        [TITLES[key.measure], ", ".join(each for each in (key.engine, key.workload) if each)]
    )


def is_dull(results: Results, rows: list[Row]) -> bool:
    """Tell whether a table of failures has none."""
    return all(
        "failed" in row.measure and not any(map(sum, results.figures[row].values())) for row in rows
    )


def _markdown(lines: list[list[str]]) -> Iterator[str]:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    yield from (head, "|---" + "|---:" * (len(lines[0]) - 1) + "|", *body, "")


def _shown(results: Results) -> Iterator[tuple[TableKey, list[Row]]]:
    """Yield the tables that somebody reads."""
    for key, rows in results.tables().items():
        # Under load it is the same as in process, with HTTP around it.
        repeats = "server CPU" in key.measure and results.part != "databases"
        if not (repeats or is_dull(results, rows)):
            yield key, rows


def _ahead(results: Results) -> Iterator[str]:
    """List by row what is ahead of this package; its own `reader` does not count."""
    for key, rows in _shown(results):
        for row in rows:
            named = [
                f"{name} {cell(results, row, name)}"
                for name, clear in results.ahead(row).items()
                if clear and name != OUR_READER
            ]
            if named:
                ours = cell(results, row, OURS)
                yield f"- {title_of(key)}, {row.name} (we: {ours}): {'; '.join(named)}."


def _chart(results: Results, key: TableKey, rows: list[Row]) -> Iterator[str]:
    columns = DRAWN.get(key.measure, ())
    panels = {row.name: results.ratios(row) for row in rows if row.name in columns}
    if not panels:
        return
    title = f"{title_of(key)} (the best of those by hand is 1)".replace("`", "")
    words = "".join(letter if letter.isalnum() else " " for letter in " ".join(key)).split()
    path = CHARTS / f"{'-'.join(words).lower()}.svg"
    path.write_text(bar_chart(title, panels, {name: kind_of(name) for name in NAMES}), "utf-8")
    yield from (f"![{title}]({path.relative_to(DOCS)})", "")


def _part(results: Results) -> Iterator[str]:
    heading, text = HEADINGS[results.part]
    about = results.about
    rounds = f", in {about['rounds']} rounds" if about["rounds"] != "1" else ""
    yield from (f"## {heading}", "", f"{text} Measured on {about['date']}{rounds}.", "")
    if float(about["load"]) > 1 and results.part != "wire":
        yield from (BUSY.format(**about), "")
    failures = {key: rows for key, rows in results.tables().items() if "failed" in key.measure}
    if failures and all(is_dull(results, rows) for rows in failures.values()):
        yield from ("No request failed.", "")
    for key, rows in _shown(results):
        yield from (f"**{title_of(key)}**", "")
        yield from _chart(results, key, rows)
        yield from _markdown(table(results, rows))


def write_page() -> None:
    """Write the page and its charts; parts that were never measured are left out."""
    CHARTS.mkdir(exist_ok=True)
    found = [results for part in get_args(Part) if (results := load_results(part))]
    lines = list(INTRODUCTION)
    about = found[0].about if found else {}
    versions = ", ".join(f"{name} {about[name]}" for name in about if name not in ABOUT_THE_RUN)
    lines += [f"Versions: {versions}; {about.get('cores')} cores.", ""]
    lines += ["| left out | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in LEFT_OUT.items()]
    lines += ["", "## Where somebody is ahead", "", AHEAD, ""]
    lines += [line for results in found for line in _ahead(results)]
    lines.append("")
    for results in found:
        lines += _part(results)
    PAGE.write_text("\n".join(lines).rstrip() + "\n", "utf-8")

"""The page `docs/performance-compared.md` and its charts, written from the saved results."""

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
    "cpu": "CPU per request",
    "trips": "Round trips per request",
    "throughput": "Requests per second, double load",
    "p50": "Median latency, double load",
    "p99": "99th percentile latency, double load",
    "server CPU": "Server CPU per request",
    "p50, calm": "Median latency, half load",
    "p99, calm": "99th percentile latency, half load",
    "server CPU, calm": "Server CPU per request, half load",
    "failed": "Failed requests",
    "failed, calm": "Failed requests, half load",
    "memory": "Server memory",
    "start-up": "CPU until the server listens",
}
HEADINGS: dict[Part, tuple[str, str]] = {
    "cpu": (
        "What a request costs",
        "The benchmark calls the application in its own process, without HTTP. This measures "
        "FastAPI, the package, SQLAlchemy and the driver.",
    ),
    "wire": (
        "What goes over the wire",
        "Round trips to the database, counted by a proxy after the connection is established. "
        "These are counts, not ratios.",
    ),
    "load": (
        "Under load",
        "uvicorn with one process and a pool of ten. Requests are sent at a fixed rate, whether "
        "or not earlier ones were answered, and latency counts from the time a request was due. "
        "Each column shows the number of client connections and the milliseconds added to a "
        "round trip to the database. Double and half load are relative to the rate that the "
        "hand-written dependency can serve, measured just before. Some contestants respond before "
        "they are done: the hand-written dependency in request scope rolls back after the "
        "response, which saves its client that round trip (`reader` needs no rollback), and "
        "advanced-alchemy commits after the response.",
    ),
    "load-sync": (
        "Under load, synchronously",
        "The same with `def` endpoints, whose requests also wait for FastAPI's forty threads. With "
        "more client connections than threads, hand-written dependencies "
        "[deadlock](synchronous-engines.md#the-gate) until the pool's timeout, and no figure would "
        "mean anything.",
    ),
    "databases": (
        "One, ten and a hundred databases",
        "That many databases are installed, and requests read from the last one. Memory is the "
        "server's peak.",
    ),
}
# Only the rows worth a chart: ratios of tiny values mean little, and more charts would hide these.
DRAWN = {
    "cpu": ("one read", "three reads", "a committed write"),
    "throughput": ("64 at 0 ms", "64 at 1 ms", "64 at 5 ms", "24 at 0 ms", "24 at 5 ms"),
    "p99": ("512 at 0 ms", "512 at 1 ms", "512 at 5 ms", "40 at 0 ms", "40 at 5 ms"),
    "memory": ("1 database", "10 databases", "100 databases"),
}
INTRODUCTION = (
    "# Compared with other packages",
    "",
    "This page compares the cost of a request with this package, with hand-written dependencies, "
    "and with other packages that integrate SQLAlchemy sessions into FastAPI. "
    "`make benchmark-peers` measures it on your machine and writes this page. "
    "[Another comparison](compared.md#side-by-side) shows what a hand-written dependency does "
    "with a transaction.",
    "",
    "Every application has the same routes and the same engines, and follows its package's "
    "documentation. The contestants take turns within each round. Each figure is the ratio to "
    "the best hand-written dependency in the same round: the median of all rounds, with the "
    "quartiles in brackets. Below 1 is better, except for requests per second, where above 1 is "
    "better. Ratios hold only for one run on one machine. [The last section]"
    "(#where-somebody-is-ahead) lists every row in which somebody else is ahead.",
    "",
    "- **By hand** is the tutorial's generator, in each of FastAPI's two scopes, with a commit in "
    "the endpoint; and a generator that wraps `begin()`.",
    "- **The limit** is a session opened inside the endpoint, without a dependency.",
    "- `reader` is this package's dependency for reads that need no transaction. `get_db` (reads) "
    "and `transactional` (writes) are shown as fastapi-sqlnative.",
    "- fastapi-async-sqlalchemy also commits reads. advanced-alchemy commits after the response.",
    "",
)
AHEAD = (
    "Contestants that were ahead of `get_db` (reads) or `transactional` (writes) in at least three "
    "of four rounds."
)
ABOUT_THE_RUN = {"date", "cores", "load", "rounds"}
BUSY = (
    "The machine was not idle: when this part began, its load was {load} on {cores} cores. Small "
    "differences are not meaningful."
)
NAMES = [each.name for each in CONTESTANTS]


def kind_of(name: str) -> str:
    """Return the colour of a contestant's bars."""
    if name in (OURS, OUR_READER):
        return "ours"
    return "hand" if name in (*BY_HAND, LIMIT) else "other"


def cell(results: Results, row: Row, name: str) -> str:
    """Format one contestant's value in one row."""
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
    """Return a table's lines: the column names, then one line per contestant."""
    present = [name for name in NAMES if any(name in results.figures[row] for row in rows)]
    lines = [[name, *(cell(results, row, name) for row in rows)] for name in present]
    return [["", *(row.name for row in rows)], *lines]


def title_of(key: TableKey) -> str:
    """Return a table's title."""
    return ": ".join(
        [TITLES[key.measure], ", ".join(each for each in (key.engine, key.workload) if each)]
    )


def is_dull(results: Results, rows: list[Row]) -> bool:
    """Return whether a table is about failures and contains none."""
    return all(
        "failed" in row.measure and not any(map(sum, results.figures[row].values())) for row in rows
    )


def _markdown(lines: list[list[str]]) -> Iterator[str]:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    yield from (head, "|---" + "|---:" * (len(lines[0]) - 1) + "|", *body, "")


def _shown(results: Results) -> Iterator[tuple[TableKey, list[Row]]]:
    """Yield the tables that are worth showing."""
    for key, rows in results.tables().items():
        # Under load, server CPU only repeats the in-process figures, plus HTTP.
        repeats = "server CPU" in key.measure and results.part != "databases"
        if not (repeats or is_dull(results, rows)):
            yield key, rows


def _ahead(results: Results) -> Iterator[str]:
    """Yield a line per row with the contestants ahead of this package, except its `reader`."""
    for key, rows in _shown(results):
        for row in rows:
            named = [
                f"{name} {cell(results, row, name)}"
                for name, clear in results.ahead(row).items()
                if clear and name != OUR_READER
            ]
            if named:
                ours = cell(results, row, OURS)
                yield f"- {title_of(key)}, {row.name} (here: {ours}): {'; '.join(named)}."


def _chart(results: Results, key: TableKey, rows: list[Row]) -> Iterator[str]:
    columns = DRAWN.get(key.measure, ())
    panels = {row.name: results.ratios(row) for row in rows if row.name in columns}
    if not panels:
        return
    title = f"{title_of(key)} (best hand-written dependency = 1)".replace("`", "")
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
    """Write the page and its charts, leaving out parts that were never measured."""
    CHARTS.mkdir(exist_ok=True)
    found = [results for part in get_args(Part) if (results := load_results(part))]
    lines = list(INTRODUCTION)
    about = found[0].about if found else {}
    versions = ", ".join(f"{name} {about[name]}" for name in about if name not in ABOUT_THE_RUN)
    lines += [f"Versions: {versions}; {about.get('cores')} cores.", ""]
    lines += ["| left out | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in LEFT_OUT.items()]
    lines.append("")
    for results in found:
        lines += _part(results)
    lines += ["## Where somebody is ahead", "", AHEAD, ""]
    lines += [line for results in found for line in _ahead(results)]
    PAGE.write_text("\n".join(lines).rstrip() + "\n", "utf-8")

"""The command line of the comparison: measure, print, save as JSON, and write the page."""

import argparse
from collections.abc import Callable, Mapping
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sqlalchemy import create_engine, text

from tests.peers import measures
from tests.peers.page import table, title_of, write_page
from tests.peers.results import Part, Results, about
from tests.peers.workloads import create_tables
from tests.postgres_server import PostgresServer

# The function of each part, and its usual number of rounds.
PARTS: Mapping[Part, tuple[Callable[..., None], int]] = {
    "cpu": (measures.measure_cpu, 41),
    "wire": (measures.measure_wire, 1),
    "load": (measures.measure_load, 3),
    "load-sync": (measures.measure_load_sync, 3),
    "databases": (measures.measure_databases, 3),
}


def measure(part: Part, *, rounds: int | None, quick: bool) -> Results:
    """Run one part on its own PostgreSQL, with a progress bar."""
    function, usual = PARTS[part]
    rounds = rounds or (1 if quick else usual)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        PostgresServer(settings={"max_connections": "300"}) as server,
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar,
    ):
        engine = create_engine(server.url.replace("postgresql:", "postgresql+psycopg:"))
        create_tables(engine)
        with engine.connect() as connection:
            version = connection.scalar(text("SHOW server_version"))
        engine.dispose()

        def progress(label: str, steps: int) -> Callable[[], None]:
            task = bar.add_task(label, total=steps)
            return lambda: bar.advance(task)

        results = Results(part, about(str(version)) | {"rounds": str(rounds)})
        function(server.url, results, progress, rounds=rounds, quick=quick)
        return results


def show(results: Results, console: Console) -> None:
    """Print the same tables as on the page."""
    for key, rows in results.tables().items():
        names, *lines = table(results, rows)
        shown = Table(title=title_of(key), title_justify="left")
        for name in names:
            shown.add_column(name, justify="right" if name else "left")
        for line in lines:
            shown.add_row(*line)
        console.print(shown)


def main() -> None:
    """Run the selected parts, or all, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*get_args(Part), []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="try it out; the page stays as it is")
    parser.add_argument("--rounds", type=int, help="fewer than usual are over sooner")
    parser.add_argument("--page", action="store_true", help="only write the page, of what is kept")
    arguments = parser.parse_args()
    if not arguments.page:
        for part in arguments.parts or PARTS:
            results = measure(part, rounds=arguments.rounds, quick=arguments.quick)
            if not arguments.quick:
                results.save()
            show(results, Console())
    if not arguments.quick:
        write_page()


if __name__ == "__main__":
    main()

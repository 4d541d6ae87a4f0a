"""How each release of the application uses `book`, while `name` becomes `title`.

The current application is release 4; the others are here to be tested on every revision that
they meet. A deployment runs two at once: the old release and the new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Insert, Select, Update, column, insert, select, table, update

book = table("book", column("id"), column("name"), column("title"))


@dataclass(frozen=True)
class Release:
    """A release, with the columns that it writes and the one that it reads."""

    writes: tuple[str, ...]
    reads: str

    def add(self, title: str) -> Insert:
        """Add a book."""
        return insert(book).values(dict.fromkeys(self.writes, title))

    def rename(self, before: str, after: str) -> Update:
        """Rename books."""
        found = book.c[self.reads] == before
        return update(book).where(found).values(dict.fromkeys(self.writes, after))

    def titles(self) -> Select[str]:
        """List the titles."""
        return select(book.c[self.reads]).order_by(book.c.id)


RELEASES: Mapping[int, Release] = {
    1: Release(writes=("name",), reads="name"),
    2: Release(writes=("name", "title"), reads="name"),
    3: Release(writes=("name", "title"), reads="title"),
    4: Release(writes=("title",), reads="title"),
}

# The releases that run on each revision: the old one, and the one that the revision is for.
RUNNING: Mapping[str, tuple[int, int]] = {
    "0001": (1, 1),
    "0002": (1, 2),
    # Between these two, once release 1 is gone: `python -m migrations_example.backfill`.
    "0003": (2, 3),
    "0004": (2, 3),
    "0005": (3, 4),
    "0006": (4, 4),
}

"""Copy `name` to `title` in small transactions, while the application runs.

    python -m migrations_example.backfill --size 1000 --pause 0.1

It stores no progress: the rows that still differ are left to do. So you can stop or kill it at any
moment, restart it, and run two at once.
"""

import asyncio
from argparse import ArgumentParser
from collections.abc import Sequence

from sqlalchemy import Select, select, update

from fastapi_sqlnative import AsyncDatabase
from migrations_example.releases import book
from migrations_example.settings import application_engine

# Not `title IS NULL`: while release 1 still ran, it renamed books that already had a title.
DIFFERS = book.c.title.is_distinct_from(book.c.name)


async def backfill(database: AsyncDatabase, *, size: int = 1000, pause: float = 0.1) -> int:
    """Copy until nothing is left, and return the number of copied rows.

    Args:
        database: the handle.
        size: rows per transaction, which are locked at once.
        pause: seconds between transactions, to leave time for other work and for standbys.
    """
    copied, after = 0, 0
    while True:
        ids = await _copy(database, _batch(after, size))
        copied += len(ids)
        if ids:
            after = ids[-1]
        elif await _is_done(database):
            return copied
        else:
            after = 0  # the rest was locked: try it again
        await asyncio.sleep(pause)


def _batch(after: int, size: int) -> Select[int]:
    """Lock the next rows by key, skipping those that another session has locked."""
    rows = select(book.c.id).where(book.c.id > after, DIFFERS).order_by(book.c.id).limit(size)
    return rows.with_for_update(skip_locked=True)


async def _copy(database: AsyncDatabase, batch: Select[int]) -> Sequence[int]:
    # On MariaDB, the default, REPEATABLE READ, would lock every row that it examines.
    async with database.transaction(isolation_level="READ COMMITTED") as session:
        ids = (await session.scalars(batch)).all()
        if ids:
            rows = update(book).where(book.c.id.in_(ids))
            await session.execute(rows.values(title=book.c.name))
        return ids


async def _is_done(database: AsyncDatabase) -> bool:
    async with database.session() as session:
        return (await session.execute(select(book.c.id).where(DIFFERS).limit(1))).first() is None


async def main() -> None:
    """Run the backfill on DATABASE_URL."""
    parser = ArgumentParser("python -m migrations_example.backfill", description=__doc__)
    parser.add_argument("--size", type=int, default=1000, help="rows in a transaction")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between transactions")
    options = parser.parse_args()
    engine = application_engine("default")
    try:
        copied = await backfill(AsyncDatabase(engine), size=options.size, pause=options.pause)
    finally:
        await engine.dispose()
    print(f"{copied} rows copied, none left.")


if __name__ == "__main__":
    asyncio.run(main())

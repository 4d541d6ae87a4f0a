"""What a request does with its session, the same for every contestant."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from fastapi import Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Engine, insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

NOTES = 100


class Base(DeclarativeBase):
    """The tables of the comparison."""


class Note(Base):
    """One of a hundred rows to read and to update."""

    __tablename__ = "peers_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    reads: Mapped[int]


class Entry(Base):
    """A row to insert."""

    __tablename__ = "peers_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class NoteOut(BaseModel):
    """A note in a response."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    text: str
    reads: int


def create_tables(engine: Engine) -> None:
    """Create the tables and the notes, and replace existing ones."""
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
        rows = [{"text": f"note {number}", "reads": 0} for number in range(NOTES)]
        connection.execute(insert(Note), rows)


# Requests take the rows in turn, so that concurrent ones seldom use the same row.
_turns = count()


def a_note() -> int:
    """Return the id of the next request's note."""
    return next(_turns) % NOTES + 1


async def leave(_session: AsyncSession) -> Response:
    return Response()


async def read(session: AsyncSession) -> Response:
    assert await session.get(Note, a_note())
    return Response()


async def read_thrice(session: AsyncSession) -> Response:
    for _ in range(3):
        assert await session.get(Note, a_note())
    return Response()


async def write(session: AsyncSession) -> Response:
    session.add(Entry(text="a"))
    return Response()


async def read_update_insert(session: AsyncSession) -> Response:
    note = await session.get(Note, a_note())
    assert note
    note.reads += 1
    session.add(Entry(text="a"))
    return Response()


async def list_notes(session: AsyncSession) -> Any:
    return (await session.scalars(select(Note).order_by(Note.id))).all()


def leave_sync(_session: Session) -> Response:
    return Response()


def read_sync(session: Session) -> Response:
    assert session.get(Note, a_note())
    return Response()


def write_sync(session: Session) -> Response:
    session.add(Entry(text="a"))
    return Response()


Work = Callable[[AsyncSession], Awaitable[Any]] | Callable[[Session], Any]


@dataclass(frozen=True)
class Workload:
    """One kind of request.

    Attributes:
        name: its name on the page.
        path: the path of its route.
        work: what it does with an asynchronous session.
        work_sync: what it does with a synchronous session, if that is measured.
        writes: whether there is something to commit.
        response_model: the model that serializes the answer.
    """

    name: str
    path: str
    work: Callable[[AsyncSession], Awaitable[Any]]
    work_sync: Callable[[Session], Any] | None = None
    writes: bool = False
    response_model: Any = None


WORKLOADS = (
    Workload("untouched", "/untouched", leave, leave_sync),
    Workload("one read", "/read", read, read_sync),
    Workload("three reads", "/three-reads", read_thrice),
    Workload("a committed write", "/write", write, write_sync, writes=True),
    Workload("read, update, insert", "/update", read_update_insert, writes=True),
    Workload("a list of 100", "/list", list_notes, response_model=list[NoteOut]),
)


def workload(path: str) -> Workload:
    """Find a workload by its route."""
    return next(each for each in WORKLOADS if each.path == path)

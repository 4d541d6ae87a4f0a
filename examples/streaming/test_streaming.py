"""Tests on a real server of the connections that a stream holds and returns."""

import asyncio
import json
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import psycopg
import pytest
from fastapi import FastAPI
from sqlalchemy import event

from examples.streaming.app import create_app
from examples.streaming.models import Measurement
from fastapi_sqlnative import installed_databases
from tests.serving import Served, backends, serve, wait_until

needs_events = pytest.mark.skipif(
    find_spec("fastapi.sse") is None, reason="this FastAPI has no server-sent events"
)
MANY = 20_000


class Streaming:
    """The example as seen by its clients and its database."""

    def __init__(self, served: Served, app: FastAPI, owner: psycopg.Connection) -> None:
        self.client = served.client
        self.loop = served.server.loop
        self.app = app
        self.owner = owner

    def add(self, *values: int) -> None:
        assert self.client.post("/measurements", json=values).status_code == 201

    def add_many(self, number: int = MANY) -> None:
        self.owner.execute(
            "INSERT INTO streaming_measurement (value) SELECT * FROM generate_series(1, %s)",
            (number,),
        )

    @property
    def tasks(self) -> set["asyncio.Task[Any]"]:
        """List what runs on the application's event loop."""
        return asyncio.all_tasks(self.loop)

    @property
    def checked_out(self) -> int | None:
        """Count the connections in use."""
        return installed_databases(self.app)["default"].pool_status().checked_out

    def in_transaction(self) -> int:
        """Count the example's connections that the server keeps open."""
        return backends(self.owner, "idle in transaction%")


@contextmanager
def served(owner: psycopg.Connection) -> Generator[Streaming]:
    """Serve the example with a pool of one."""
    app = create_app(pool_size=1)
    with serve(app) as running:
        yield Streaming(running, app, owner)


def follow(streaming: Streaming, following: ExitStack, **headers: str) -> Iterator[int]:
    """Follow the events, and yield each ID."""
    request = streaming.client.stream("GET", "/events", headers=headers)
    response = following.enter_context(request)
    assert response.headers["content-type"].startswith("text/event-stream")
    return ids(response.iter_lines())


def ids(lines: Iterator[str]) -> Iterator[int]:
    for line in lines:
        if line.startswith("id: "):
            yield int(line.removeprefix("id: "))


def test_everything_is_exported(owner: psycopg.Connection) -> None:
    """An export has a line of JSON per row, and returns its connection at the end."""
    with served(owner) as streaming:
        streaming.add_many(MANY // 20)
        with streaming.client.stream("GET", "/measurements") as response:
            assert response.headers["content-type"] == "application/x-ndjson"
            found: list[Any] = [json.loads(line) for line in response.iter_lines()]
        assert [each["value"] for each in found] == list(range(1, MANY // 20 + 1))
        wait_until(lambda: streaming.checked_out == 0)


def test_a_client_that_leaves_an_export_gives_its_connection_back(
    owner: psycopg.Connection,
) -> None:
    """An export is sent as it is read; when its client has gone, no connection is in use."""
    loaded: list[Measurement] = []

    def note(measurement: Measurement, _context: object) -> None:
        loaded.append(measurement)

    event.listen(Measurement, "load", note)
    with served(owner) as streaming:
        streaming.add_many(10 * MANY)
        with streaming.client.stream("GET", "/measurements") as response:
            reading = response.iter_lines()  # if it were collected, it would close the response
            assert next(reading) == '{"id":1,"value":1}'
            assert len(loaded) < MANY
            assert streaming.checked_out == 1
            wait_until(lambda: streaming.in_transaction() == 1)  # in the middle of its cursor
        wait_until(lambda: streaming.checked_out == 0)
        # A connection closed inside its cursor leaves the pool before the server notices.
        wait_until(lambda: streaming.in_transaction() == 0)
        streaming.add(1)  # the pool of one is free
    event.remove(Measurement, "load", note)


@needs_events
def test_events_hold_no_connection_while_they_wait(
    owner: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While twenty clients wait for an event, a pool of one stays available to others."""
    monkeypatch.setattr("examples.streaming.events.PAUSE", 60)
    with served(owner) as streaming, ExitStack() as following:
        streaming.add(7)
        streams = [follow(streaming, following) for _ in range(20)]
        assert [next(stream) for stream in streams] == [1] * 20
        wait_until(lambda: streaming.checked_out == 0)
        streaming.add(8)


@needs_events
def test_what_is_new_reaches_everybody(owner: psycopg.Connection) -> None:
    """A client that follows gets measurements stored afterwards."""
    with served(owner) as streaming, ExitStack() as following:
        streams = [follow(streaming, following) for _ in range(5)]
        streaming.add(7, 8)
        assert [(next(stream), next(stream)) for stream in streams] == [(1, 2)] * 5


@needs_events
def test_a_client_that_leaves_the_events_leaves_nothing(owner: psycopg.Connection) -> None:
    """When every client has gone, polling stops and no connection is in use."""
    with served(owner) as streaming:
        before = streaming.tasks
        streaming.add(7)
        with ExitStack() as following:
            streams = [follow(streaming, following) for _ in range(5)]
            assert [next(stream) for stream in streams] == [1] * 5
            assert len(streaming.tasks - before) >= 5
        wait_until(lambda: streaming.tasks == before)
        wait_until(lambda: streaming.checked_out == 0)
        wait_until(lambda: streaming.in_transaction() == 0)


@needs_events
def test_a_client_that_comes_back_goes_on(owner: psycopg.Connection) -> None:
    """With the ID of the last event that it received, a client gets the later ones."""
    with served(owner) as streaming, ExitStack() as following:
        streaming.add(7, 8, 9)
        assert next(follow(streaming, following, **{"Last-Event-ID": "2"})) == 3

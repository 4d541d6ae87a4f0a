"""Clients that read, write, and compare and set registers, and a check of the results."""

import math
import random
from collections.abc import Iterator

from tests.faults.audit import Entry, Load, State
from tests.faults.checker import Operation, is_linearizable

NAMES = ("r1", "r2", "r3")
INITIAL = "0"
GIVES_WAY = "503 The service is busy. Try again."


class RegisterLoad(Load):
    """A load on a few registers under one isolation level, which writes every value once."""

    def __init__(self, port: int, level: str, clients: int) -> None:
        super().__init__(port, (level,), clients)
        self._level = level
        self._chance = random.Random(13)
        self._latest = dict.fromkeys(NAMES, INITIAL)

    def next_entry(self, number: int) -> Entry:
        """Choose an operation at random, where an exchange expects the value that was sent last."""
        name = self._chance.choice(NAMES)
        match self._chance.choice(("read", "write", "exchange", "exchange")):
            case "read":
                return Entry(name, "GET", f"/{self._level}/read/{name}")
            case "write":
                value = f"w{number}"
            case _:
                value = f"{self._latest[name]}:x{number}"
        self._latest[name] = value.rpartition(":")[2]
        kind = "exchange" if ":" in value else "write"
        return Entry(name, "POST", f"/{self._level}/{kind}/{name}?value={value}")

    def failures(self, since: float) -> list[Entry]:
        """List the unacknowledged operations, except those that had to give way to another."""
        return [each for each in super().failures(since) if each.said != GIVES_WAY]

    def inconsistent(self, stored: dict[str, str], now: float) -> list[str]:
        """List the registers whose history, including the value stored now, no order explains."""
        return [
            name
            for name in NAMES
            if not is_linearizable(
                [*self.history(name), Operation(now, now, found=stored[name])], INITIAL
            )
        ]

    def history(self, name: str) -> Iterator[Operation]:
        """Yield what happened or may have happened to a register, without refused operations."""
        for each in self.ledger:
            if each.name == name and each.state is not State.REFUSED:
                yield _operation(each)


def _operation(entry: Entry) -> Operation:
    _, _, value = entry.path.partition("?value=")
    expected, colon, new = value.rpartition(":")
    is_known = entry.state is State.ACKNOWLEDGED
    returned = entry.answered if is_known else math.inf
    if not value:  # a read without an answer reveals and changes nothing
        return Operation(entry.sent, returned, found=entry.answer if is_known else None)
    if not colon:
        return Operation(entry.sent, returned, left=new)
    if is_known and entry.answer != expected:
        return Operation(entry.sent, returned, found=str(entry.answer))
    return Operation(entry.sent, returned, found=expected, left=new)

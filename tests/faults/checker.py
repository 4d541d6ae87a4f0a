"""A check that a register's operations could have happened one after another.

The search is Wing and Gong's, with Lowe's cache of states that lead nowhere. It takes any pending
operation that no other pending one precedes in real time, and continues with the value that this
operation leaves. Each value must be written only once. Then a write of unknown outcome whose value
no client has found can be ignored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """An operation of a client, and its result.

    Attributes:
        called, returned: when it began and ended. Without a known outcome the end is infinite, and
            the operation may not have happened.
        found: the value before, or None if the client does not know it.
        left: the value afterwards, or None if the operation changed nothing.
    """

    called: float
    returned: float
    found: str | None = None
    left: str | None = None

    @property
    def is_known(self) -> bool:
        """Return whether the operation has certainly happened."""
        return self.returned < math.inf


def is_linearizable(history: Sequence[Operation], initial: str) -> bool:
    """Return whether an order that respects real time explains all operations."""
    seen_values = {each.found for each in history}
    operations = [each for each in history if each.is_known or each.left in seen_values]
    wanted = sum(1 << index for index, each in enumerate(operations) if each.is_known)
    waiting, visited = [(0, initial)], set[tuple[int, str]]()
    while waiting:
        done, value = state = waiting.pop()
        if done & wanted == wanted:
            return True
        if state not in visited:
            visited.add(state)
            waiting += _next(operations, done, value)
    return False


def _next(operations: Sequence[Operation], done: int, value: str) -> list[tuple[int, str]]:
    pending = [each for each in enumerate(operations) if not done >> each[0] & 1]
    horizon = min(each.returned for _, each in pending)
    concurrent = [each for each in pending if each[1].called <= horizon]
    # An operation that may not have happened is tried only right before its reader, because nothing
    # comes between a write and its first reader. Otherwise each of them would double the search.
    wanted = {each.found for _, each in concurrent}
    possible = [
        (index, each)
        for index, each in concurrent
        if each.found in (None, value) and (each.is_known or each.left in wanted)
    ]
    possible.sort(key=lambda each: each[1].returned, reverse=True)  # the last is tried first
    for index, each in possible:
        if each.left is None:  # a matching read changes nothing, so no other order is better
            return [(done | 1 << index, value)]
    return [(done | 1 << index, each.left or value) for index, each in possible]

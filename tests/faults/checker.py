"""Whether what clients saw of a register could have happened one operation after the other.

The search is Wing's and Gong's, with Lowe's memory of states that lead nowhere: take any operation
that nothing before it in real time is still missing, and go on with the value that it leaves.
It wants every value to be written once. Then a write that nobody has seen need not be considered.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """What a client did and saw.

    Attributes:
        called, returned: when; what has no known outcome never returned, and may not have happened.
        found: the value before, or None if the client was not told.
        left: the value afterwards, or None if the operation changed nothing.
    """

    called: float
    returned: float
    found: str | None = None
    left: str | None = None

    @property
    def is_known(self) -> bool:
        """Tell whether it has certainly happened."""
        return self.returned < math.inf


def is_linearizable(history: Sequence[Operation], initial: str) -> bool:
    """Tell whether there is an order, within real time, in which all of it makes sense."""
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
    # An operation that may never have happened can wait until right before its reader: nothing
    # comes between a write and its first reader. Without this it would double the search each.
    wanted = {each.found for _, each in concurrent}
    possible = [
        (index, each)
        for index, each in concurrent
        if each.found in (None, value) and (each.is_known or each.left in wanted)
    ]
    possible.sort(key=lambda each: each[1].returned, reverse=True)  # the last is tried first
    for index, each in possible:
        if each.left is None:  # a read that fits changes nothing: no other order is better
            return [(done | 1 << index, value)]
    return [(done | 1 << index, each.left or value) for index, each in possible]

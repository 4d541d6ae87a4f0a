"""The checker of registers, on which the fault suite's results about consistency depend."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.checker import Operation, is_linearizable


def read(called: float, returned: float, found: str) -> Operation:
    return Operation(called, returned, found=found)


def write(called: float, returned: float, left: str) -> Operation:
    return Operation(called, returned, left=left)


def exchange(called: float, returned: float, found: str, left: str) -> Operation:
    return Operation(called, returned, found=found, left=left)


UNKNOWN = math.inf

POSSIBLE = {
    "one after the other": [write(0, 1, "a"), read(2, 3, "a"), exchange(4, 5, "a", "b")],
    "a read beside a write sees either": [write(0, 9, "a"), read(1, 2, "0"), read(3, 4, "a")],
    "an unknown write is seen late": [write(0, UNKNOWN, "a"), read(5, 6, "0"), read(7, 8, "a")],
    "an unknown write never happens": [write(0, UNKNOWN, "a"), read(5, 6, "0")],
    "an unknown exchange had another's value": [
        write(0, 1, "a"),
        exchange(0, UNKNOWN, "0", "b"),
        read(2, 3, "a"),
    ],
    "overlapping exchanges make a chain": [
        exchange(0, 9, "b", "c"),
        exchange(0, 9, "a", "b"),
        exchange(0, 9, "0", "a"),
    ],
}
IMPOSSIBLE = {
    "an acknowledged write is lost": [write(0, 1, "a"), read(2, 3, "0")],
    "a refused write is stored": [read(0, 1, "refused")],
    "a read goes back": [write(0, UNKNOWN, "a"), read(1, 2, "a"), read(3, 4, "0")],
    "an update is lost": [exchange(0, 5, "0", "a"), exchange(0, 5, "0", "b")],
    "a write happens after it was acknowledged": [
        write(0, 1, "a"),
        write(2, 3, "b"),
        read(4, 5, "a"),
    ],
    "a value is read before it is written": [read(0, 1, "a"), write(2, 3, "a")],
    "an unknown write happens twice": [
        write(0, UNKNOWN, "a"),
        read(1, 2, "a"),
        write(3, 4, "b"),
        read(5, 6, "b"),
        read(7, 8, "a"),
    ],
}


@pytest.mark.parametrize("history", POSSIBLE.values(), ids=POSSIBLE)
def test_a_history_that_an_order_explains_is_accepted(history: list[Operation]) -> None:
    """A history that is possible on one register is accepted."""
    assert is_linearizable(history, "0")


@pytest.mark.parametrize("history", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_history_that_no_order_explains_is_found(history: list[Operation]) -> None:
    """A history that is impossible on one register is rejected, also with many later writes."""
    assert not is_linearizable(history, "0")
    later = [write(100 + 2 * n, 101 + 2 * n, f"later-{n}") for n in range(50)]
    assert not is_linearizable([*later, *history], "0")


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Draw a few operations that mostly overlap, in which no value is written twice."""
    history = []
    values = ["0", "v0", "v1", "v2", "v3", "v4"]
    for number in range(draw(st.integers(1, 5))):
        called = draw(st.integers(0, 6))
        returned = draw(st.sampled_from([called, called + 1, called + 3, UNKNOWN]))
        found = draw(st.sampled_from([None, *values]))
        left = draw(st.sampled_from([None, f"v{number}"]))
        if left is None and (found is None or returned == UNKNOWN):
            continue  # it contains no information
        history.append(Operation(called, returned, found, left))
    return history


def makes_sense(order: Sequence[Operation]) -> bool:
    value = "0"
    for index, each in enumerate(order):
        if each.found not in (None, value):
            return False
        if any(later.returned < each.called for later in order[index:]):
            return False
        value = each.left or value
    return True


def has_an_order(history: Sequence[Operation]) -> bool:
    """Try every order of every possible subset."""
    known = [each for each in history if each.is_known]
    unknown = [each for each in history if not each.is_known]
    return any(
        makes_sense(order)
        for count in range(len(unknown) + 1)
        for happened in itertools.combinations(unknown, count)
        for order in itertools.permutations([*known, *happened])
    )


def test_the_checker_agrees_with_trying_every_order(thorough: bool) -> None:
    """On small histories the checker agrees with trying every order of every possible subset."""

    @settings(max_examples=250 if thorough else 80, deadline=None, derandomize=True)
    @given(histories())
    def agree(history: list[Operation]) -> None:
        assert is_linearizable(history, "0") is has_an_order(history)

    agree()

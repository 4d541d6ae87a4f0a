"""What can go wrong with an installed database, each with its own class.

Every message names the object, the state it is in and what to do about it. None of them
contains SQL, parameters or what the driver said: those stay in ``__cause__``, for the log.
"""

from fastapi import HTTPException

__all__ = [
    "AfterCommitError",
    "ApplicationAlreadyStartedError",
    "BlockingSessionError",
    "ClientDisconnectedError",
    "CommitOutcomeUnknownError",
    "DatabaseAlreadyInstalledError",
    "DatabaseDependencyError",
    "DatabaseNotInstalledError",
    "DatabaseNotStartedError",
    "DeadlineExceededError",
    "PartialCommitError",
    "ReadOnlySessionError",
    "RequestCancelledError",
    "SessionFinishedError",
    "TransactionAbortedError",
    "TransactionOptionsError",
    "UncommittedChangesError",
]


class DatabaseNotInstalledError(LookupError):
    """No database of that name is installed on the application."""


class DatabaseAlreadyInstalledError(RuntimeError):
    """The application already has a database of that name."""


class ApplicationAlreadyStartedError(RuntimeError):
    """The application has started: it is too late to install, or it runs on another event loop."""


class DatabaseNotStartedError(RuntimeError):
    """The database is installed, but the application's lifespan is not running."""


class DatabaseDependencyError(RuntimeError):
    """A route depends on a database in a way that cannot work; found when the app starts."""


class SessionFinishedError(RuntimeError):
    """A session was used after the request, or the block, that it belongs to."""


class BlockingSessionError(RuntimeError):
    """A request's synchronous session was used on the event loop's own thread."""


class ReadOnlySessionError(RuntimeError):
    """A write was attempted through a session from ``reader``."""


class TransactionOptionsError(RuntimeError):
    """An isolation level or ``read_only`` was requested that cannot apply, or no longer can."""


class UncommittedChangesError(RuntimeError):
    """A request returned normally, and what it wrote had not been committed."""


class TransactionAbortedError(RuntimeError):
    """A commit was refused: an error inside the transaction had been swallowed."""


class CommitOutcomeUnknownError(RuntimeError):
    """The connection was lost during COMMIT: what was written may or may not be stored."""


class AfterCommitError(RuntimeError):
    """The transaction is stored, and something that ran after its COMMIT has failed.

    The failure, of an ``after_commit`` listener for example, is the ``__cause__``. Repeating the
    work would store it twice.
    """


class PartialCommitError(RuntimeError):
    """One database of a request has committed, and a later one has not.

    ``committed`` holds the names of the databases that keep what was written, ``failed`` the
    name of the one whose failure is the ``__cause__``. Repeating the request repeats the
    committed part.
    """

    def __init__(self, committed: tuple[str, ...], failed: str) -> None:
        super().__init__(committed, failed)
        self.committed = committed
        self.failed = failed

    def __str__(self) -> str:
        kept = ", ".join(repr(name) for name in self.committed)
        return (
            f"Database {self.failed!r} failed to commit after {kept} had committed: the request "
            "is half stored. Do not repeat it; fix the data by hand, or write the second part "
            "through an outbox in the first database."
        )


class RequestCancelledError(HTTPException):
    """A request was cancelled before its COMMIT, and is rolled back."""

    def __init__(self, status_code: int, detail: str, message: str) -> None:
        super().__init__(status_code, detail)
        self.message = message

    def __str__(self) -> str:
        return self.message


class DeadlineExceededError(RequestCancelledError):
    """A request took longer than its ``deadline``. The client reads 504.

    The ``__cause__`` shows what the request was waiting for, if it was waiting.
    """

    def __init__(self, route: str | None, seconds: float) -> None:
        super().__init__(
            504,
            "The service took too long to answer.",
            f"{route or 'A request'} was not done within {seconds:g} s, its deadline, and is "
            "rolled back. Make what it waited for faster, which the cause says, or give deadline() "
            "more seconds.",
        )


class ClientDisconnectedError(RequestCancelledError):
    """The client has disconnected, and ``cancel_on_disconnect`` has ended its request."""

    def __init__(self, route: str | None) -> None:
        # What nginx calls it. No client reads that, but middleware does.
        super().__init__(
            499,
            "The client has gone away.",
            f"The client of {route or 'a request'} has gone away: the request is rolled back. "
            "Nothing is to be done, unless it should be finished: leave its method out of "
            "cancel_on_disconnect(methods=...).",
        )

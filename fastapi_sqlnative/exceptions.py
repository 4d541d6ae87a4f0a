"""The exceptions of this package.

Every message names the object, its state and the fix. No message contains SQL, parameters or
the driver's message: those stay in ``__cause__``, for the log.
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
    """The application has already started, or is running on another event loop."""


class DatabaseNotStartedError(RuntimeError):
    """The database is installed, but the application's lifespan is not running."""


class DatabaseDependencyError(RuntimeError):
    """A route depends on a database in a way that cannot work."""


class SessionFinishedError(RuntimeError):
    """A session was used after its request or block had ended."""


class BlockingSessionError(RuntimeError):
    """A request's synchronous session was used on the event loop's thread."""


class ReadOnlySessionError(RuntimeError):
    """A session from ``reader`` was used to write."""


class TransactionOptionsError(RuntimeError):
    """The requested isolation level or ``read_only`` cannot apply, or comes too late."""


class UncommittedChangesError(RuntimeError):
    """A request returned normally without committing its changes."""


class TransactionAbortedError(RuntimeError):
    """A commit was refused because an error inside the transaction was swallowed."""


class CommitOutcomeUnknownError(RuntimeError):
    """The connection was lost during COMMIT: the changes may or may not be stored."""


class AfterCommitError(RuntimeError):
    """The transaction was committed, but code that ran after its COMMIT failed.

    The ``__cause__`` is that failure, for example an ``after_commit`` listener's. Repeating the
    work would store it twice.
    """


class PartialCommitError(RuntimeError):
    """One database of a request committed, and a later one failed to.

    ``committed`` names the databases that did commit, ``failed`` the database whose failure is
    the ``__cause__``. Repeating the request repeats the committed part.
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
    """A request was cancelled before its COMMIT and rolled back."""

    def __init__(self, status_code: int, detail: str, message: str) -> None:
        super().__init__(status_code, detail)
        self.message = message

    def __str__(self) -> str:
        return self.message


class DeadlineExceededError(RequestCancelledError):
    """A request took longer than its ``deadline``. The client gets a 504.

    The ``__cause__`` shows what the request was waiting for, if anything.
    """

    def __init__(self, route: str | None, seconds: float) -> None:
        super().__init__(
            504,
            "The service took too long to answer.",
            f"{route or 'A request'} missed its deadline of {seconds:g} s and was rolled back. "
            "The cause shows what it waited for: make that faster, or give deadline() more "
            "seconds.",
        )


class ClientDisconnectedError(RequestCancelledError):
    """The client disconnected, and ``cancel_on_disconnect`` ended its request."""

    def __init__(self, route: str | None) -> None:
        # nginx's status code for this. The client never sees it, but middleware does.
        super().__init__(
            499,
            "The client has gone away.",
            f"The client of {route or 'a request'} disconnected, and the request was rolled back. "
            "If it should be finished all the same, leave its method out of "
            "cancel_on_disconnect(methods=...).",
        )

"""The transaction that a session's `begin()` returns."""

from typing import Any, Self

from sqlalchemy import Connection
from sqlalchemy.orm import SessionTransaction


class BegunTransaction:
    """The transaction that `begin()` returns. Its commit is the session's commit."""

    def __init__(self, session: Any, transaction: SessionTransaction) -> None:
        self._session = session
        self.transaction = transaction

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transaction, name)

    def connection(
        self, bindkey: Any, execution_options: Any = None, **arguments: Any
    ) -> Connection:
        """Hand out a connection, as the session's own `connection()` does."""
        arguments["mapper"] = bindkey
        connection: Connection = self._session.connection(arguments, execution_options)
        return connection

    def commit(self) -> None:
        """Commit the session, if this is still its transaction."""
        if self.transaction.is_active:
            self._session.commit()
        else:
            self.transaction.commit()  # raises SQLAlchemy's own error

    def rollback(self) -> None:
        """Roll the transaction back."""
        self._session.sqlnative.end_results(streams_only=True)
        self.transaction.rollback()

    def __enter__(self) -> Self:
        self.transaction.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if error is None and self.transaction.is_active:
                self._session.commit()
        except BaseException as failure:
            kind, error, traceback = type(failure), failure, failure.__traceback__
            raise
        finally:
            self._session.sqlnative.end_results(streams_only=True)
            self.transaction.__exit__(kind, error, traceback)


def depth_of(transaction: SessionTransaction) -> int:
    """Return the number of transactions and savepoints around a savepoint."""
    return 0 if transaction.parent is None else 1 + depth_of(transaction.parent)

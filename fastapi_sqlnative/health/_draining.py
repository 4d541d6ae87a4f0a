"""Taking an application out of service before its server stops."""

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

from starlette.applications import Starlette

from .._lifespan.running import installations_of
from .._seconds import check_seconds
from ..exceptions import ApplicationAlreadyStartedError

logger = logging.getLogger("fastapi_sqlnative")


def start_draining(app: Starlette) -> None:
    """Make an application's readiness fail from now on; all other requests are still served.

    It can be called from a signal handler, and more than once. The next start-up resets it.

    Args:
        app: the application; applications mounted in it become not ready as well.
    """
    installed = installations_of(app)
    if not installed.draining:
        installed.draining = True
        logger.info("The application is draining: it is no longer ready, but still serves.")


def drain_on_sigterm(app: Starlette, *, seconds: float = 5.0) -> None:
    """Start draining on SIGTERM, and call the server's own handler some seconds later.

    Call this before the application starts. A second SIGTERM stops the server at once.

    Args:
        app: the application that is served.
        seconds: how long to drain; longer than a load balancer needs to notice.

    Raises:
        ValueError: the time is below zero.
        ApplicationAlreadyStartedError: the application has started.
    """
    check_seconds("seconds", seconds, zero=True)
    if installations_of(app).runs:
        raise ApplicationAlreadyStartedError(
            "SIGTERM cannot be handled: the application has started. Call drain_on_sigterm where "
            "the application is created, before it is served."
        )
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: Any) -> AsyncGenerator[Any]:
        async with inner(served) as state:
            loop = asyncio.get_running_loop()
            stop: Any = signal.getsignal(signal.SIGTERM)  # the server's handler, if it has one

            def drain(signum: int, frame: FrameType | None) -> None:
                signal.signal(signal.SIGTERM, stop)
                start_draining(app)
                loop.call_soon_threadsafe(loop.call_later, seconds, stop, signum, frame)

            if callable(stop) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, drain)
            yield state

    app.router.lifespan_context = lifespan

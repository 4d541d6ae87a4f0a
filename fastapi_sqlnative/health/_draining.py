"""Taking an application out of service before its server stops."""

from __future__ import annotations

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

logger = logging.getLogger("fastapi_sqlnative")


def start_draining(app: Starlette) -> None:
    """Make an application not ready from now on; everything else is still served.

    It can be called from a signal handler, and more than once. The next start resets it.

    Args:
        app: the application; those mounted in it are not ready either.
    """
    installed = installations_of(app)
    if not installed.draining:
        installed.draining = True
        logger.info("The application drains: it is not ready any more, and still serves.")


def drain_on_sigterm(app: Starlette, *, seconds: float = 5.0) -> None:
    """On SIGTERM start draining, and run the server's own handler some seconds later.

    Call it before the application starts. A second SIGTERM stops the server at once.

    Args:
        app: the application that is served.
        seconds: for which it drains: more than a load balancer needs to notice.
    """
    check_seconds("seconds", seconds, zero=True)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: Any) -> AsyncGenerator[Any]:
        async with inner(served) as state:
            loop = asyncio.get_running_loop()
            stop: Any = signal.getsignal(signal.SIGTERM)  # the server's own, if it has one

            def drain(signum: int, frame: FrameType | None) -> None:
                signal.signal(signal.SIGTERM, stop)
                start_draining(app)
                loop.call_soon_threadsafe(loop.call_later, seconds, stop, signum, frame)

            if callable(stop) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, drain)
            yield state

    app.router.lifespan_context = lifespan

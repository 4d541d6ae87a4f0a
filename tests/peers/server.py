"""A contestant under uvicorn, in its own process.

`python -m tests.peers.server NAME async|sync URL DATABASES` prints its port. Then, for each line
that it reads, it prints what it has used so far as JSON: `cpu` in seconds, and `memory` (its peak)
in bytes.
"""

import json
import resource
import sys
import threading
import time
from typing import Any

import uvicorn

from tests.peers.contestants import contestant


class _Server(uvicorn.Server):
    """A server that prints its port, and ends when its standard input does."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)
        threading.Thread(target=self.answer, daemon=True).start()

    def answer(self) -> None:
        for _ in sys.stdin:
            used = resource.getrusage(resource.RUSAGE_SELF)
            # Linux counts in kilobytes, macOS in bytes.
            unit = 1 if sys.platform == "darwin" else 1024
            # getrusage() can return the same CPU time twice although the server has worked.
            told = {"cpu": time.process_time(), "memory": used.ru_maxrss * unit}
            print(json.dumps(told), flush=True)
        self.should_exit = True


def main(name: str, colour: str, url: str, databases: str) -> None:
    """Serve until the standard input ends."""
    urls = [url] * int(databases)
    app = contestant(name).application(urls, asynchronous=colour == "async")
    _Server(uvicorn.Config(app, port=0, log_level="error", access_log=False)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])

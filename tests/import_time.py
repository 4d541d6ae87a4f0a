"""A measurement of the time that our import adds to importing FastAPI and SQLAlchemy.

Run it with `python -m tests.import_time`. One process imports all three in turn, and Python itself
reports the time of each. Only a ratio of these times is promised.
"""

import re
import subprocess
import sys

# The limit of our import time relative to FastAPI's, and the number of processes, of which the
# best counts.
PROMISED, PROCESSES = 0.15, 5
IMPORTS = "import fastapi, sqlalchemy.ext.asyncio, sqlalchemy.orm; import fastapi_sqlnative"


def ratio() -> float:
    """Return our import time, without that of the frameworks, divided by FastAPI's."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", IMPORTS],
        capture_output=True,
        text=True,
        check=True,
    )
    taken = dict[str, int]()
    for microseconds, name in re.findall(r"\d+ \| +(\d+) \| (\S+)$", done.stderr, re.MULTILINE):
        taken[name] = int(microseconds)
    return taken["fastapi_sqlnative"] / taken["fastapi"]


def main() -> int:
    """Print the ratio, and return 1 if it is higher than promised."""
    found = min(ratio() for _ in range(PROCESSES))
    print(f"import {found:.2f} (promised {PROMISED:.2f}; fastapi = 1.00)")
    return int(found > PROMISED)


if __name__ == "__main__":
    sys.exit(main())

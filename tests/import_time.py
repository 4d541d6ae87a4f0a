"""Measure what importing the package adds to importing FastAPI and SQLAlchemy.

`python -m tests.import_time`. One process imports all three in turn, and Python itself says how
long each took; only their ratio is promised.
"""

import re
import subprocess
import sys

# The most that our import may take, to FastAPI's own. The best of so many processes counts.
PROMISED, PROCESSES = 0.15, 5
IMPORTS = "import fastapi, sqlalchemy.ext.asyncio, sqlalchemy.orm; import fastapi_sqlnative"


def ratio() -> float:
    """Return what our import takes, once the frameworks are there, to what FastAPI's takes."""
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
    """Print the ratio; return 1 when it is more than promised."""
    found = min(ratio() for _ in range(PROCESSES))
    print(f"import {found:.2f} (promised {PROMISED:.2f}; fastapi = 1.00)")
    return int(found > PROMISED)


if __name__ == "__main__":
    sys.exit(main())

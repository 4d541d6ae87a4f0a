"""The report of pinned versions with known vulnerabilities: `make audit`.

pip-audit looks up every line of constraints.txt in OSV. audit.toml lists the vulnerabilities that
are accepted. If OSV cannot be reached, the report says that nothing is known, and does not fail.
"""

import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from datetime import UTC, date, datetime
from pathlib import Path

OSV = "https://api.osv.dev/v1/query"
HERE = Path(__file__).parent
REACH_TIMEOUT = 10.0


def audit(url: str = OSV, *, exceptions: Path = HERE / "audit.toml", today: date) -> int:
    """Print the report, and return the exit code: 0 unless something has to be done."""
    accepted = tomllib.loads(exceptions.read_text("utf-8"))["exception"]
    if overdue := [each["id"] for each in accepted if each["until"] <= today]:
        print(f"{exceptions.name}: look again at {', '.join(overdue)}, whose time is over.")
        return 1
    if problem := _unreachable(url):
        print(f"OSV could not be asked, so nothing is known of the pinned versions: {problem}")
        return 0
    for each in accepted:
        print(f"accepted until {each['until']}: {each['id']}: {each['reason']}", flush=True)
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service=osv"]
    command += [f"--osv-url={url}", "--disable-pip", "--no-deps", "--progress-spinner=off"]
    command += [f"--requirement={HERE.parent / 'constraints.txt'}", "--desc=off"]
    command += [f"--ignore-vuln={each['id']}" for each in accepted]
    return subprocess.run(command, check=False).returncode


def _unreachable(url: str) -> str | None:
    """Return why OSV cannot be reached, or `None` if it answers, even with an HTTP error."""
    try:
        urllib.request.urlopen(url, timeout=REACH_TIMEOUT).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except OSError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(audit(today=datetime.now(UTC).date()))

"""Write what was found as JSON for machines and as Markdown for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults.run import Finding


def write_report(folder: Path, findings: Sequence[Finding], seconds: float) -> None:
    """Write `report.json` and `report.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"seconds": seconds, "faults": [asdict(each) for each in findings]}
    (folder / "report.json").write_text(json.dumps(content, indent=1), "utf-8")

"""A lock file out of pip's report on what it would install: `python experiments/lock.py report.json`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def lines(report: dict[str, Any]) -> list[str]:
    """``name==version --hash=sha256:...`` of each package, sorted, the project itself aside."""
    found = []
    for package in report["install"]:
        digest = package["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest:
            about = package["metadata"]
            name = re.sub("[-_.]+", "-", about["name"]).lower()
            found.append(f"{name}=={about['version'].partition('+')[0]} --hash=sha256:{digest}")
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))

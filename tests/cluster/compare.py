"""Whether two output folders hold the same results, byte for byte where the format allows.

What may differ, and is looked at in no other way: ``logs/`` (ids and times of runs). In the
sidecar of a label map ``Seconds``, ``PeakMemoryGib`` and ``Command``; in a subject's page the text
that shows these, its own command line and when it was made. Everything else has the same bytes.

Usage: ``python -m tests.cluster.compare FOLDER FOLDER``
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

MEASURED = ("Seconds", "PeakMemoryGib", "Command")
SHOWN = re.compile(
    r'(<dt>(?:Peak memory|Time|Command)</dt>\s*<dd[^>]*>|<p class="made">)[^<]*', re.IGNORECASE
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but the logs, by relative path, without what was measured."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("logs/"):
            found[name] = _comparable(path)
    return found


def _comparable(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name.endswith("_dseg.json"):
        sidecar = json.loads(content)
        return json.dumps({k: v for k, v in sidecar.items() if k not in MEASURED}).encode()
    if path.suffix == ".html":
        return SHOWN.sub(r"\1", content.decode("utf-8")).encode()
    return content


def differences(one: Path, other: Path) -> list[str]:
    """A line per file that is missing on one side or differs."""
    left, right = contents(one), contents(other)
    lines = [f"{name}: only in {one}" for name in left.keys() - right.keys()]
    lines += [f"{name}: only in {other}" for name in right.keys() - left.keys()]
    lines += [
        f"{name}: differs" for name in left.keys() & right.keys() if left[name] != right[name]
    ]
    return sorted(lines)


if __name__ == "__main__":
    folders = Path(sys.argv[1]), Path(sys.argv[2])
    said = differences(*folders)
    print("\n".join(said) or f"{len(contents(folders[0]))} files are the same")
    sys.exit(bool(said))

"""Which `raise` of the package no test reached, from a coverage measurement.

Usage: ``python benchmarks/raises.py COVERAGE.json [LEAST_PERCENT]`` (``make coverage`` measures)

Prints the branch coverage of the package and every raise statement whose line was never run. Exit
code 1 if there is one, or if the coverage is below `LEAST` percent.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST = 95.0


def raises(path: Path) -> list[tuple[int, str]]:
    """Line and text of every raise statement of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.lineno, ast.unparse(node)[:100])
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
    ]


def unreached(measured: dict) -> list[str]:
    """``file:line: statement`` of every raise that was never run."""
    found = []
    for name, entry in sorted(measured["files"].items()):
        missing = set(entry["missing_lines"])
        found += [f"{name}:{n}: {text}" for n, text in raises(ROOT / name) if n in missing]
    return found


def main() -> int:
    """Print them."""
    measured = json.loads(Path(sys.argv[1]).read_text())
    least = float(sys.argv[2]) if len(sys.argv) > 2 else LEAST
    percent = measured["totals"]["percent_covered"]
    lines = unreached(measured)
    print("\n".join(lines))
    print(f"branch coverage {percent:.1f} %, {len(lines)} raise statements never reached")
    return int(bool(lines) or percent < least)


if __name__ == "__main__":
    sys.exit(main())

"""``tlseg-status``: what became of every scan, over all runs and shards of an output folder."""

from __future__ import annotations

import sys
from collections import Counter

from tlseg_bids.cli.options import Parser
from tlseg_bids.cli.run import report, until_closed
from tlseg_bids.cli.values import absolute
from tlseg_bids.errors import TlsegError, amount, one_line

DESCRIPTION = "What became of every scan, over all runs and shards that share an output folder."
EPILOG = "exit codes: 0 every scan is done; 1 one failed or is unfinished; 66 no run was there"


def parser() -> Parser:
    """The parser of ``tlseg-status``."""
    it = Parser(prog="tlseg-status", description=DESCRIPTION, epilog=EPILOG)
    it.add_argument("out_dir", type=absolute, metavar="OUT_DIR", help="folder of the derivatives")
    it.add_argument("--tsv", action="store_true", help="print one table of all scans instead")
    return it


@until_closed
def main(argv: list[str] | None = None) -> int:
    """Run ``tlseg-status``; returns the exit code."""
    try:
        given = parser().parse_args(sys.argv[1:] if argv is None else list(argv))
        from tlseg_bids.bids.status import as_tsv, read_status

        found = read_status(given.out_dir)
    except SystemExit as stop:
        return int(stop.code or 0)
    except TlsegError as error:
        return report(error, "tlseg-status")
    bad = [status for status in found if not status.good]
    if given.tsv:
        print(as_tsv(found), end="")
        return int(bool(bad))
    for status in bad:
        said = [status.row.get(name, "") for name in ("error", "hint")]
        words = " – ".join(word for word in said if word not in ("", "n/a"))
        line = f"{status.scan}: {status.status} in run {status.run}"
        print(one_line(f"{line} – {words}" if words else line))
    counts = Counter(status.status for status in found)
    kinds = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    print(f"{amount(len(found), 'scan')}: {kinds}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

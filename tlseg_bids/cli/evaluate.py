"""``tlseg-evaluate``: score label images against reference labels."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tlseg_bids.bids.names import in_standard_space
from tlseg_bids.cli.options import Parser
from tlseg_bids.cli.run import report, until_closed
from tlseg_bids.cli.values import absolute
from tlseg_bids.config import without_home
from tlseg_bids.errors import (
    CannotCreateError,
    NoInputError,
    NothingSelectedError,
    TlsegError,
    UsageError,
)

if TYPE_CHECKING:
    import pandas as pd

ENDINGS = (".nii.gz", ".nii")
COMPAT = "compat"  # the same labels under other names
FREE_ENTITIES = ("space", "seg", "desc", "res", "label")


@until_closed
def main(argv: list[str] | None = None) -> int:
    """Run ``tlseg-evaluate``.

    Parameters
    ----------
    argv : list of str, optional
        The command line without the program's name.

    Returns
    -------
    int
        0; 1 if a pair could not be scored; else the exit code of the error.
    """
    try:
        given = parser().parse_args(sys.argv[1:] if argv is None else list(argv))
        _check_output(given.output)
        pairs = match(given.predicted, given.reference)
        tables, failed = _score_all(pairs, given)
        if tables:
            _write(tables, given.output)
            if given.output is not None:
                words = sys.argv[1:] if argv is None else list(argv)
                command = without_home(shlex.join(["tlseg-evaluate", *words]))
                _agree(tables, given.output, command)
        return int(failed)
    except SystemExit as stop:
        return int(stop.code or 0)
    except TlsegError as error:
        return report(error, "tlseg-evaluate")


def parser() -> Parser:
    """The parser of ``tlseg-evaluate``."""
    it = Parser(
        prog="tlseg-evaluate",
        description="Score label images (files, or whole derivative folders) against a reference: "
        "Dice, weighted Dice, volume similarity, HD95 and mean surface distance per structure.",
    )
    it.add_argument("predicted", type=absolute, metavar="PREDICTED", help="dseg file or folder")
    it.add_argument(
        "reference", type=absolute, metavar="REFERENCE",
        help="dseg file, or a folder whose files are matched by their BIDS entities",
    )  # fmt: skip
    it.add_argument(
        "--protocol", metavar="NAME", help="protocol of PREDICTED (default: its seg- entity)"
    )
    it.add_argument(
        "--mapping", metavar="NAME",
        help="mapping between the two protocols, braincolor_to_aseg or aseg_to_infant for example",
    )  # fmt: skip
    it.add_argument(
        "--map-both", action="store_true",
        help="REFERENCE is in PREDICTED's protocol, and both go through --mapping: parcels of the "
        "cortex are scored as one structure, for example",
    )  # fmt: skip
    it.add_argument(
        "-o", "--output", type=absolute, metavar="TSV",
        help="write the table there and print the means (default: print the table); beside it, "
        "agreement of volumes over scans as NAME_agreement.tsv and NAME.html",
    )  # fmt: skip
    it.add_argument(
        "--no-distances", action="store_true", help="leave out the surface distances (faster)"
    )
    return it


def match(predicted: Path, reference: Path) -> list[tuple[Path, Path]]:
    """Pairs of files: each prediction with the reference that shares most of its entities.

    Every entity of the reference but space, seg, desc, res and label must be in the prediction's
    name with the same value. Of equals, those count that name the prediction's space.

    Raises
    ------
    NoInputError
        If a path does not exist.
    NothingSelectedError
        If nothing matches.
    UsageError
        If two references fit equally well.
    """
    for path in (predicted, reference):
        if not path.exists():
            raise NoInputError("no such file or folder", path, "check the path")
    if predicted.is_file() and reference.is_file():
        return [(predicted, reference)]
    references = [(entities(path), path) for path in label_files(reference)]
    pairs = []
    for path in label_files(predicted):
        own = entities(path).items()
        fits = [(len(other), file) for other, file in references if other.items() <= own]
        best = [file for size, file in fits if size == max(fits)[0]]
        best = [file for file in best if _space(file) == _space(path)] or best
        if len(best) > 1:
            raise UsageError(
                f"{len(best)} references fit equally well, such as {best[0].name} and "
                f"{best[1].name}",
                path, "name the reference file itself",
            )  # fmt: skip
        pairs += [(path, file) for file in best]
    if not pairs:
        raise NothingSelectedError(
            f"no prediction matches any reference, of which there "
            f"{'is' if len(references) == 1 else 'are'} {len(references)}", predicted,
            "the names must share sub-, ses-, run- and so on",
        )  # fmt: skip
    return pairs


def _space(path: Path) -> str:
    """The part ``space-…`` of a name; empty where it has none."""
    parts = path.name.split(".")[0].split("_")
    return next((part for part in parts if part.startswith("space-")), "")


def label_files(path: Path) -> list[Path]:
    """The file itself, or every ``*_dseg.nii[.gz]`` below a folder on the grid of a scan."""
    if path.is_file():
        return [path]
    found = (file for ending in ENDINGS for file in path.rglob(f"*_dseg{ending}"))
    return sorted(
        file
        for file in found
        if not in_standard_space(file) and COMPAT not in file.relative_to(path).parts
    )


def entities(path: Path) -> dict[str, str]:
    """Entities of a BIDS name that tell scans apart."""
    pairs = (part.split("-", 1) for part in path.name.split(".")[0].split("_") if "-" in part)
    return {key: value for key, value in pairs if key not in FREE_ENTITIES}


def _check_output(output: Path | None) -> None:
    """Refuse a table that could not be written, before anything is scored for it.

    Raises
    ------
    UsageError
        If its name is that of the page, which would take its place.
    CannotCreateError
        If it, or what lies beside it, cannot be written.
    """
    if output is None:
        return
    if output.suffix == ".html":
        raise UsageError(
            "the table would be lost: the page of agreement has the same name", f"-o {output}",
            f"write -o {output.with_suffix('.tsv').name}; the page lies beside it",
        )  # fmt: skip
    new = not output.exists()
    try:
        with tempfile.TemporaryFile(dir=output.parent), output.open("ab"):
            pass
        if new:
            output.unlink()
    except OSError as error:
        raise _not_writable(error, output) from error


def _not_writable(error: OSError, output: Path) -> CannotCreateError:
    return CannotCreateError(
        f"the table cannot be written ({error.strerror})", output, "choose another place"
    )


def _score_all(
    pairs: list[tuple[Path, Path]], given: argparse.Namespace
) -> tuple[list[pd.DataFrame], bool]:
    """A table per pair; a pair that cannot be read is reported and the next one is scored."""
    from tlseg_bids.errors import ScanError
    from tlseg_bids.labels.mapping import load_mapping
    from tlseg_bids.metrics import summary

    mapping = load_mapping(given.mapping) if given.mapping else None
    for sentence in mapping.describe() if mapping else ():
        print(sentence, file=sys.stderr)
    tables, failed = [], False
    for predicted, reference in pairs:
        try:
            table = _score(predicted, reference, mapping, given)
        except ScanError as error:
            report(error, "tlseg-evaluate")
            failed = True
            continue
        means = ", ".join(f"{key} {value:.3f}" for key, value in summary(table).items())
        print(f"{predicted.name}: {means}", file=sys.stderr)
        tables.append(table)
    return tables, failed


def _score(predicted: Path, reference: Path, mapping, given: argparse.Namespace) -> pd.DataFrame:
    """The scores of one pair, with the two names in front."""
    from tlseg_bids.labels.protocol import load_protocol
    from tlseg_bids.metrics import compare
    from tlseg_bids.volume import load_labels

    protocol = load_protocol(given.protocol or _protocol_name(predicted))
    pair = load_labels(predicted), load_labels(reference)
    table = compare(*pair, protocol, mapping, not given.no_distances, given.map_both)
    if table.attrs["unknown"]:
        labels = ", ".join(map(str, table.attrs["unknown"]))
        print(f"{reference.name}: labels {labels} have no meaning, left out", file=sys.stderr)
    table.insert(0, "predicted", predicted.name)
    table.insert(1, "reference", reference.name)
    return table


def _protocol_name(path: Path) -> str:
    """Value of the entity ``seg``."""
    for part in path.name.split(".")[0].split("_"):
        if part.startswith("seg-"):
            return part.removeprefix("seg-")
    raise UsageError("the name has no seg- entity", path, "say --protocol NAME")


def _agree(tables: list[pd.DataFrame], output: Path, command: str) -> None:
    """Agreement over scans beside the table, as TSV and as a page."""
    import pandas as pd

    from tlseg_bids.bids.atomic import write_text
    from tlseg_bids.metrics import agreement
    from tlseg_bids.report.agreement import write_agreement_page

    table = pd.concat(tables, ignore_index=True)
    text = agreement(table).to_csv(sep="\t", index=False, na_rep="n/a", float_format="%.5g")
    write_text(output.with_name(f"{output.stem}_agreement.tsv"), text)
    write_agreement_page(output.with_suffix(".html"), table, command)


def _write(tables: list[pd.DataFrame], output: Path | None) -> None:
    """The table to a file or to the screen; means over scans to the screen."""
    import numpy as np
    import pandas as pd

    from tlseg_bids.metrics import summary

    table = pd.concat(tables, ignore_index=True)
    text = table.to_csv(sep="\t", index=False, na_rep="n/a", float_format="%.5g")
    if output is None:
        print(text, end="")
    else:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _not_writable(error, output) from error
    means = [summary(t) for t in tables]
    stream = sys.stderr if output is None else sys.stdout
    for key in means[0]:
        values = np.array([m[key] for m in means])
        values = values[np.isfinite(values)]
        mean = f"{values.mean():.4f}" if len(values) else "n/a"
        spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
        print(f"{key}: {mean}{spread} (n = {len(values)})", file=stream)


if __name__ == "__main__":
    sys.exit(main())

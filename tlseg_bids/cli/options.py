"""The grammar of ``tlseg``: every option, what it takes, and how a configuration file says it.

Only the standard library is imported here: ``--help`` must not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Container
from pathlib import Path
from typing import Any, NoReturn

from tlseg_bids import __version__
from tlseg_bids.cli import values
from tlseg_bids.errors import DataError, NoInputError, UnknownLevelError, UsageError

LEVELS = ("participant", "group")
AUTO = "auto"

DESCRIPTION = """\
Label the structures of the brain in every T1w and T2w scan of a BIDS dataset. The model is chosen
scan by scan from what the dataset says (suffix, age, contrast agent), and the report says why. The
level `group` makes tables and a page of all labelled scans in OUT_DIR."""

EPILOG = """\
exit codes: 0 all done; 1 a scan failed, the others are finished; 16 not a BIDS dataset; 17 unknown
level; 18 the filters match nothing; 64 usage; 65 bad data; 66 no input; 73 cannot create output;
74 writing failed; 75 the output is locked by another run, try again"""


class Parser(argparse.ArgumentParser):
    """argparse with errors as `UsageError` (exit code 64), so that there is one kind of message."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "the command line", f"see {self.prog} --help")


def parser() -> Parser:
    """The parser of ``tlseg``. Options that were not given are absent from the result."""
    it = Parser(
        prog="tlseg",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    it.add_argument(
        "bids_dir", type=values.absolute, metavar="BIDS_DIR", help="root of the dataset"
    )
    it.add_argument(
        "out_dir", type=values.absolute, metavar="OUT_DIR", help="folder of the derivatives"
    )
    it.add_argument("level", metavar="{" + ",".join(LEVELS) + "}", help="level of the analysis")
    it.add_argument("--version", action="version", version=f"tlseg {__version__}")
    it.add_argument(
        "-v", "--verbose", action="count", dest="verbosity", help="say more; -vv adds tracebacks"
    )
    it.add_argument(
        "--config-file", type=values.absolute, metavar="TOML",
        help="options as TOML, long names without dashes in front; the command line wins",
    )  # fmt: skip
    _selection(it.add_argument_group("which scans"))
    _models(it.add_argument_group("which model"))
    _adaptation(it.add_argument_group("adapting a model to labelled scans"))
    _resources(it.add_argument_group("with what"))
    _run(it.add_argument_group("how"))
    _group(it.add_argument_group("level group"))
    return it


def _selection(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--participant-label", nargs="+", type=values.participant, dest="participants",
        metavar="LABEL", help="participants, with or without sub-",
    )  # fmt: skip
    group.add_argument(
        "--session-label", nargs="+", type=values.session, dest="sessions", metavar="LABEL",
        help="sessions, with or without ses-",
    )  # fmt: skip
    group.add_argument(
        "--bids-filter-file", type=values.filters, dest="filters", metavar="JSON",
        help="pybids filters for t1w and t2w, as in fMRIPrep",
    )  # fmt: skip
    group.add_argument(
        "--bids-database-dir", type=values.absolute, dest="database_dir", metavar="DIR",
        help="folder of a pybids database, kept between runs",
    )  # fmt: skip
    group.add_argument(
        "--skip-bids-validation", action="store_true", help="do not run the BIDS validator"
    )
    group.add_argument(
        "--multi-run", choices=("each", "first", "best-qc"),
        help="label every run (default), or the first readable run alone; at the level group, "
        "which run of a scan to use: each, the first, or the one of best quality",
    )  # fmt: skip
    group.add_argument(
        "--shard", type=values.shard, metavar="I/N",
        help="every N-th participant from the I-th on, to divide a dataset among machines",
    )  # fmt: skip
    group.add_argument(
        "--age",
        metavar="AGE",
        help="age at every scan: years (34), another unit (6 months), or weeks with pma (40w pma)",
    )


def _models(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", help="use this model for every scan")
    group.add_argument(
        "--models", nargs="+", type=values.absolute, dest="model_dirs", metavar="DIR",
        help="folders with further models (NAME.toml or NAME/card.toml)",
    )  # fmt: skip
    group.add_argument(
        "--licence", choices=("any", "permissive"),
        help="licence that the weights must have (default: any)",
    )  # fmt: skip
    group.add_argument(
        "--protocol",
        metavar="NAME",
        help="label in this protocol, braincolor for example (default: aseg, or what a model "
        "adapted to your scans answers in)",
    )
    group.add_argument(
        "--offline", action="store_true",
        help="never fetch weights or templates; without it they are fetched once, where they lie "
        "elsewhere",
    )  # fmt: skip


def _adaptation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fine-tune", nargs="?", const=AUTO, metavar="RECIPE",
        help="adapt a model to the scans that --labels has labels for, and write it to "
        "OUT_DIR/models; RECIPE is auto (default), a preset, or a TOML file",
    )  # fmt: skip
    group.add_argument(
        "--labels", type=values.absolute, dest="labels_dir", metavar="DERIVATIVES",
        help="BIDS derivative with label images (seg-…_dseg.nii.gz) and their look-up table",
    )  # fmt: skip
    group.add_argument(
        "--name", type=values.model_name, dest="site", metavar="SITE",
        help="name of the adapted model (default: site)",
    )  # fmt: skip
    group.add_argument(
        "--base", metavar="MODEL",
        help="model to adapt (default: the one the plan takes for the labelled scans)",
    )  # fmt: skip
    group.add_argument(
        "--budget", type=values.minutes, dest="budget_minutes", metavar="MINUTES",
        help="time the adaptation may take (default: 60)",
    )  # fmt: skip


def _resources(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", type=values.device, metavar="{auto,cpu,cuda,cuda:N,mps}",
        help="auto (default): the GPU with the most free memory if it suffices, else the CPU",
    )  # fmt: skip
    group.add_argument(
        "--nprocs", "--n-cpus", type=values.count, metavar="N",
        help="CPUs for the whole run (default: all that this process may use)",
    )  # fmt: skip
    group.add_argument(
        "--omp-nthreads", type=values.count, dest="threads", metavar="N",
        help="CPUs for one scan (default: --nprocs, shared by the scans that memory has room for)",
    )  # fmt: skip
    group.add_argument(
        "--mem", "--mem-mb", type=values.memory, dest="memory_gib", metavar="SIZE",
        help="memory for the whole run, such as 8G; a bare number is megabytes, as in fMRIPrep",
    )  # fmt: skip
    group.add_argument(
        "-w", "--work-dir", type=values.absolute, metavar="DIR", help="folder for temporary files"
    )
    group.add_argument(
        "--scan-timeout", type=values.time_limit, dest="scan_timeout_minutes", metavar="MINUTES",
        help="give a scan up after that time; each scan is then labelled in a process of its own",
    )  # fmt: skip
    group.add_argument(
        "--executor", choices=("local", "dask"),
        help="who labels the scans: this process (default), or the workers of --dask",
    )  # fmt: skip
    group.add_argument(
        "--dask", type=values.dask, metavar="WHERE",
        help="address of a Dask scheduler (tcp://host:8786), its scheduler file (.json), or a file "
        "that says how to start workers on Slurm, PBS, LSF (.toml)",
    )  # fmt: skip


def _run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dry-run", action="store_true",
        help="print scan, model, reason, device and memory, and stop",
    )  # fmt: skip
    group.add_argument(
        "--reports-only", action="store_true", help="write the reports of finished scans again"
    )
    group.add_argument(
        "--boilerplate-only", action="store_true", help="write the methods text and stop"
    )
    group.add_argument(
        "--stop-on-first-crash", action="store_true", help="do not go on after a failed scan"
    )
    group.add_argument(
        "--probabilities", action="store_true", help="write the probability of every label too"
    )
    group.add_argument(
        "--output-spaces", nargs="+", metavar="TEMPLATE",
        help="write labels on the grid of TemplateFlow templates too, MNI152NLin2009cAsym:res-2 "
        "or MNIInfant:cohort-2 for example (affine)",
    )  # fmt: skip
    group.add_argument(
        "--compat", action="store_true",
        help="write OUT_DIR/compat too: the names that fMRIPrep, sMRIPrep and NiBabies read as "
        "precomputed (one T1w and one T2w of a session)",
    )  # fmt: skip
    group.add_argument("--random-seed", type=values.seed, metavar="N", help="seed (default: 0)")


def _group(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--volume", choices=("hard", "soft"),
        help="volume by voxels (hard, default) or by probabilities (soft)",
    )  # fmt: skip
    group.add_argument(
        "--icv-correction", choices=("none", "ratio", "residual", "power-proportion"),
        help="correction of volumes for head size (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--head-size", choices=("icv", "brain"),
        help="head size of that correction: intracranial volume (default) or brain volume",
    )  # fmt: skip
    group.add_argument(
        "--combat", "--harmonise", metavar="COLUMN",
        help="remove the effect of the site (or scanner) that this column names, with ComBat",
    )  # fmt: skip
    group.add_argument(
        "--combat-covariates", nargs="+", metavar="COLUMN",
        help="columns whose effect ComBat keeps, such as age_years sex; or the word none",
    )  # fmt: skip
    group.add_argument(
        "--combat-reference", metavar="SITE", help="site whose volumes ComBat leaves as they are"
    )
    group.add_argument(
        "--fit-where", nargs="+", type=values.condition, metavar="COLUMN=VALUE",
        help="fit ComBat and the head-size correction on these scans only, and apply it to all",
    )  # fmt: skip
    group.add_argument(
        "--group-parameters", type=values.absolute, metavar="JSON",
        help="apply the fit that an earlier run saved as group_parameters.json",
    )  # fmt: skip
    group.add_argument(
        "--ratings", nargs="+", type=values.absolute, metavar="PATH",
        help="ratings exported by the reports: TSV files, or folders of *_ratings.tsv",
    )  # fmt: skip


def parse(argv: list[str]) -> dict[str, Any]:
    """Values of the command line and of its ``--config-file``, by name; defaults are left out.

    Raises
    ------
    UsageError, UnknownLevelError
        If the command line or a key of the file makes no sense.
    NoInputError, DataError
        If a file that was named is absent or damaged.
    """
    it = parser()
    given = vars(it.parse_args([with_hyphens(word) for word in argv]))
    if given["level"] not in LEVELS:
        raise UnknownLevelError(
            f"unknown level '{given['level']}'", "third argument", f"use {' or '.join(LEVELS)}"
        )
    file = given.pop("config_file", None)
    return given if file is None else {**read_config_file(file, it, given), **given}


def with_hyphens(word: str) -> str:
    """``--participant_label`` as ``--participant-label``: both are habits of the field."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def read_config_file(
    path: Path, it: argparse.ArgumentParser, given: Container[str] = ()
) -> dict[str, Any]:
    """Values of a TOML file, checked as those of the command line are.

    Keys are the long names of options without the dashes in front. What is `given` already, by its
    name in `Config`, is not looked at: a filter file that another one replaces need not be there.

    Raises
    ------
    NoInputError
        If there is no such file.
    DataError
        If it is not TOML.
    UsageError
        If a key is no option, or a value is not one that the option takes.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NoInputError(
            f"the configuration file cannot be read ({error.strerror})", path, "correct the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the configuration file is not TOML ({error})", path, "correct it, or leave it out"
        ) from error
    actions = file_keys(it)
    found = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            raise UsageError(
                f"unknown key '{key}'", path,
                f"did you mean '{near[0]}'?" if near else f"known are {', '.join(actions)}",
            )  # fmt: skip
        if actions[name].dest not in given:
            found[actions[name].dest] = _value(actions[name], value, f"{path}, {key}")
    return found


def file_keys(it: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a configuration file may say: long name of an option to its action."""
    return {
        name[2:]: action
        for action in it._actions
        for name in action.option_strings
        if name.startswith("--") and action.dest not in ("help", "version", "config_file")
    }


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    """One value of the file as the command line would have given it; filters may stand in it."""
    if action.dest == "filters" and isinstance(value, dict):
        return values.checked_filters(value, where)
    if action.nargs == 0:
        kind = int if action.dest == "verbosity" else bool
        if type(value) is not kind:
            words = "an integer" if kind is int else "true or false"
            raise UsageError(f"{value!r} is not {words}", where, f"write {words}")
        return value
    if action.nargs == "?" and value is True:
        return action.const
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        return [_converted(action, item, where) for item in items]
    return _converted(action, value, where)


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, bool | list | dict):
        raise UsageError(f"{value!r} is not one value", where, "write text or a number")
    try:
        result = action.type(str(value)) if action.type else str(value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error), where, "see tlseg --help") from error
    if action.choices and result not in action.choices:
        raise UsageError(
            f"'{value}' is no choice", where, f"choose from {', '.join(action.choices)}"
        )
    return result

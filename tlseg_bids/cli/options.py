"""The grammar of ``tlseg``: every option, what it takes, and how a configuration file says it.

Only the standard library is imported here: ``--help`` must not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from tlseg_bids import __version__
from tlseg_bids.errors import DataError, NoInputError, UnknownLevelError, UsageError

LEVELS = ("participant", "group")
MIN_MEMORY_GIB = 0.5
MIN_BUDGET_MINUTES = 0.5
AUTO = "auto"
UNITS = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}

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
    it.add_argument("bids_dir", type=absolute, metavar="BIDS_DIR", help="root of the dataset")
    it.add_argument("out_dir", type=absolute, metavar="OUT_DIR", help="folder of the derivatives")
    it.add_argument("level", metavar="{" + ",".join(LEVELS) + "}", help="level of the analysis")
    it.add_argument("--version", action="version", version=f"tlseg {__version__}")
    it.add_argument(
        "-v", "--verbose", action="count", dest="verbosity", help="say more; -vv adds tracebacks"
    )
    it.add_argument(
        "--config-file", type=absolute, metavar="TOML",
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
        "--participant-label", nargs="+", type=participant, dest="participants", metavar="LABEL",
        help="participants, with or without sub-",
    )  # fmt: skip
    group.add_argument(
        "--session-label", nargs="+", type=session, dest="sessions", metavar="LABEL",
        help="sessions, with or without ses-",
    )  # fmt: skip
    group.add_argument(
        "--bids-filter-file", type=filters, dest="filters", metavar="JSON",
        help="pybids filters for t1w and t2w, as in fMRIPrep",
    )  # fmt: skip
    group.add_argument(
        "--bids-database-dir", type=absolute, dest="database_dir", metavar="DIR",
        help="folder of a pybids database, kept between runs",
    )  # fmt: skip
    group.add_argument(
        "--skip-bids-validation", action="store_true", help="do not run the BIDS validator"
    )
    group.add_argument(
        "--multi-run", choices=("each", "first"),
        help="label every run (default), or the first readable run alone",
    )  # fmt: skip
    group.add_argument(
        "--shard", type=shard, metavar="I/N",
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
        "--models", nargs="+", type=absolute, dest="model_dirs", metavar="DIR",
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
        help="never fetch weights; without it they are fetched once, where they lie elsewhere",
    )  # fmt: skip


def _adaptation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fine-tune", nargs="?", const=AUTO, metavar="RECIPE",
        help="adapt a model to the scans that --labels has labels for, and write it to "
        "OUT_DIR/models; RECIPE is auto (default), a preset, or a TOML file",
    )  # fmt: skip
    group.add_argument(
        "--labels", type=absolute, dest="labels_dir", metavar="DERIVATIVES",
        help="BIDS derivative with label images (seg-…_dseg.nii.gz) and their look-up table",
    )  # fmt: skip
    group.add_argument(
        "--name", type=model_name, dest="site", metavar="SITE",
        help="name of the adapted model (default: site)",
    )  # fmt: skip
    group.add_argument(
        "--base", metavar="MODEL",
        help="model to adapt (default: the one the plan takes for the labelled scans)",
    )  # fmt: skip
    group.add_argument(
        "--budget", type=minutes, dest="budget_minutes", metavar="MINUTES",
        help="time the adaptation may take (default: 60)",
    )  # fmt: skip


def _resources(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", type=device, metavar="{auto,cpu,cuda,cuda:N,mps}",
        help="auto (default): the GPU with the most free memory if it suffices, else the CPU",
    )  # fmt: skip
    group.add_argument(
        "--nprocs", "--n-cpus", type=count, metavar="N",
        help="CPUs for the whole run (default: all that this process may use)",
    )  # fmt: skip
    group.add_argument(
        "--omp-nthreads", type=count, dest="threads", metavar="N",
        help="CPUs for one scan (default: --nprocs, shared by the scans that memory has room for)",
    )  # fmt: skip
    group.add_argument(
        "--mem", "--mem-mb", type=memory, dest="memory_gib", metavar="SIZE",
        help="memory for the whole run, such as 8G; a bare number is megabytes, as in fMRIPrep",
    )  # fmt: skip
    group.add_argument(
        "-w", "--work-dir", type=absolute, metavar="DIR", help="folder for temporary files"
    )
    group.add_argument(
        "--scan-timeout", type=time_limit, dest="scan_timeout_minutes", metavar="MINUTES",
        help="give a scan up after that time; each scan is then labelled in a process of its own",
    )  # fmt: skip
    group.add_argument(
        "--executor", choices=("local", "dask"),
        help="who labels the scans: this process (default), or the workers of --dask",
    )  # fmt: skip
    group.add_argument(
        "--dask", type=dask, metavar="WHERE",
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
    group.add_argument("--random-seed", type=seed, metavar="N", help="seed (default: 0)")


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
        "--fit-where", nargs="+", type=condition, metavar="COLUMN=VALUE",
        help="fit ComBat and the head-size correction on these scans only, and apply it to all",
    )  # fmt: skip
    group.add_argument(
        "--group-parameters", type=absolute, metavar="JSON",
        help="apply the fit that an earlier run saved as group_parameters.json",
    )  # fmt: skip
    group.add_argument(
        "--ratings", nargs="+", type=absolute, metavar="PATH",
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
    return given if file is None else {**read_config_file(file, it), **given}


def with_hyphens(word: str) -> str:
    """``--participant_label`` as ``--participant-label``: both are habits of the field."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def read_config_file(path: Path, it: argparse.ArgumentParser) -> dict[str, Any]:
    """Values of a TOML file, checked as those of the command line are.

    Keys are the long names of options without the dashes in front.

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
    values = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            raise UsageError(
                f"unknown key '{key}'", path,
                f"did you mean '{near[0]}'?" if near else f"known are {', '.join(actions)}",
            )  # fmt: skip
        values[actions[name].dest] = _value(actions[name], value, f"{path}, {key}")
    return values


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
        return checked_filters(value, where)
    if action.nargs == 0:
        kind = int if action.dest == "verbosity" else bool
        if type(value) is not kind:
            words = "an integer" if kind is int else "true or false"
            raise UsageError(f"{value!r} is not {words}", where, f"write {words}")
        return value
    if action.nargs == "?" and value is True:
        return action.const
    if action.nargs == "+":
        values = value if isinstance(value, list) else [value]
        return [_converted(action, item, where) for item in values]
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


def absolute(text: str) -> Path:
    """An absolute path; links keep their names, so that a DataLad dataset stays as it is."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text).expanduser().absolute()


def participant(text: str) -> str:
    """A participant label without ``sub-``."""
    return _label(text, "sub-")


def session(text: str) -> str:
    """A session label without ``ses-``."""
    return _label(text, "ses-")


def _label(text: str, prefix: str) -> str:
    label = text.removeprefix(prefix)
    if not re.fullmatch(r"[0-9A-Za-z+]+", label):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no BIDS label; labels are letters and digits, separated by spaces"
        )
    return label


def condition(text: str) -> str:
    """``COLUMN=VALUE``, as it stands."""
    column, equals, value = text.partition("=")
    if not (column and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is not COLUMN=VALUE, such as group=control")
    return text


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def minutes(text: str) -> float:
    """A time in minutes."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or float(text) < MIN_BUDGET_MINUTES:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number of minutes of at least {MIN_BUDGET_MINUTES:g}"
        )
    return float(text)


def time_limit(text: str) -> float:
    """A time in minutes, above 0."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or float(text) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of minutes above 0")
    return float(text)


def model_name(text: str) -> str:
    """A name that a model card and its folder can have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' cannot name a model; use letters, digits, '.', '_' and '-'"
        )
    return text


def seed(text: str) -> int:
    """A whole number from 0 to 2³² − 1."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """``I/N`` as (I, N), 1 ≤ I ≤ N."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with 1 ≤ I ≤ N, such as 2/8")
    return int(match[1]), int(match[2])


def device(text: str) -> str:
    """A device as PyTorch names it, or ``auto``."""
    if not re.fullmatch(r"auto|cpu|mps|cuda|cuda:[0-9]+", text):
        raise argparse.ArgumentTypeError(f"'{text}' is none of auto, cpu, cuda, cuda:N, mps")
    return text


def dask(text: str) -> str:
    """The address of a scheduler, or the absolute path of a .json or .toml file."""
    if re.fullmatch(r"(tcp|tls|ws|wss|ucx)://\S+", text):
        return text
    if not text.endswith((".json", ".toml")):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither an address such as tcp://host:8786 nor a .json or .toml file"
        )
    return str(absolute(text))


def memory(text: str) -> float:
    """An amount of memory in GiB: ``8G``, ``8000M``, ``8000`` (megabytes). K, M, G, T are 2¹⁰ᵏ."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount of memory, such as 8G")
    gib = float(match[1]) * UNITS[match[2] or "M"]
    if gib < MIN_MEMORY_GIB:
        raise argparse.ArgumentTypeError(
            f"'{text}' is {gib:.3g} GiB, less than the {MIN_MEMORY_GIB} GiB the program needs to "
            "start; a bare number is megabytes, so write 8G for 8 GiB"
        )
    return gib


def filters(text: str) -> dict[str, dict[str, Any]]:
    """The content of a filter file: a JSON object of objects."""
    path = absolute(text)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NoInputError(
            f"the filter file cannot be read ({error.strerror})", path, "correct the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the filter file is not JSON ({error})", path, "correct it") from error
    return checked_filters(content, path)


def checked_filters(content: Any, where: object) -> dict[str, dict[str, Any]]:
    """Refuse filters that are not an object of objects.

    Raises
    ------
    DataError
        If they are something else.
    """
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise DataError(
            "the filters are not an object of objects", where,
            'write for example {"t1w": {"session": "01", "acquisition": "mprage"}}',
        )  # fmt: skip
    return content

"""``tlseg``: the BIDS App on the command line.

Everything heavy is imported after the command line was understood.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from tlseg_bids.cli.options import parse
from tlseg_bids.config import ADAPTATION, OPTIONS, Config, without_home
from tlseg_bids.errors import OutputError, TlsegError, UsageError, no_memory, one_line

INTERRUPTED = 130
BROKEN_PIPE = 141
STDERR = 2
Main = Callable[..., int]
EXCLUSIVE = ("dry_run", "reports_only", "boilerplate_only")
TUPLES = (
    "participants", "sessions", "model_dirs", "combat_covariates", "fit_where", "ratings",
    "output_spaces",
)  # fmt: skip
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
NO_TELEMETRY = ("NO_ET", "NIPYPE_NO_ET")
"""Keep nipype and its relatives, which niworkflows imports, from calling home."""
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")


def until_closed(main: Main) -> Main:
    """A command that ends quietly where the reader of what it prints (``| head``) has enough.

    So it does after Ctrl-C and SIGTERM, and it can always print: characters that the encoding of
    the terminal lacks as escapes, and to nowhere where it was started without stdout or stderr.
    """

    @wraps(main)
    def quietly(argv: list[str] | None = None) -> int:
        _open_streams()
        _settle_home()
        try:
            with _until_told():
                code = main(argv)
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return BROKEN_PIPE
            return report(system_error(error), Path(sys.argv[0]).name)
        except KeyboardInterrupt:
            print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
            return INTERRUPTED
        return code

    return quietly


def _open_streams() -> None:
    """Make stdout and stderr streams that anything can be printed to.

    Where they are closed, the next files that are opened would take their numbers, and libraries
    would write their messages into them.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8"))
        elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _settle_home() -> None:
    """Give a user without a home folder one among the temporary files.

    A container that is run as a user whom its system does not know, without the variable HOME, has
    none, and several libraries ask for it when they are imported.
    """
    try:
        Path.home()
    except RuntimeError:
        import tempfile

        os.environ["HOME"] = str(Path(tempfile.gettempdir()) / f"tlseg-{os.getuid()}")


@until_closed
def main(argv: list[str] | None = None) -> int:
    """Run the BIDS App.

    Parameters
    ----------
    argv : list of str, optional
        The command line without the program's name; that of the process where not given.

    Returns
    -------
    int
        Exit code, as ``tlseg --help`` lists them; 130 after Ctrl-C or SIGTERM, 141 where nobody
        reads any more what is printed.
    """
    verbosity = 0
    # Without memory, a library in Rust that prints a backtrace waits for itself for ever.
    os.environ["RUST_BACKTRACE"] = "0"
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        command = without_home(shlex.join(["tlseg", *words]))
        config = make_config({**parse(words), "command": command})
        verbosity = config.verbosity
        check_folders(config)
        return _run(config)
    except SystemExit as stop:
        return int(stop.code or 0)
    except TlsegError as error:
        return report(error, "tlseg", verbosity)
    except (OSError, MemoryError, RuntimeError) as error:
        closed = isinstance(error, BrokenPipeError)
        if closed or (isinstance(error, RuntimeError) and not no_memory(error)):
            raise
        return report(system_error(error), "tlseg", verbosity)
    except KeyboardInterrupt:
        told = "finished scans are kept, and the same command goes on from there"
        print(f"tlseg: stopped; {told}", file=sys.stderr)
        return INTERRUPTED


def system_error(error: OSError | MemoryError | RuntimeError) -> TlsegError:
    """The sentence for what the system refused outside of any scan: a drive that went, memory."""
    if not isinstance(error, OSError):
        return OutputError(
            "not enough memory", "", "free some, or use a larger machine; finished scans are kept"
        )
    hint = "check the disk or the network drive, then start again; finished scans are kept"
    if isinstance(error, PermissionError):
        hint = "give the user who runs this access to it, then start again; finished scans are kept"
    return OutputError(
        f"reading or writing failed ({error.strerror or error})", error.filename or "", hint
    )


def report(error: TlsegError, program: str, verbosity: int = 0) -> int:
    """Print an error as one line to stderr, with a traceback from -vv on; return its exit code."""
    if verbosity >= 2:
        traceback.print_exception(error)
    print(f"{program}: {one_line(str(error))}", file=sys.stderr)
    return error.exit_code


def make_config(values: dict[str, Any]) -> Config:
    """The run that the values of `tlseg_bids.cli.options.parse` ask for.

    Raises
    ------
    UsageError
        If two options exclude each other.
    """
    asked = [name for name in EXCLUSIVE if values.get(name)]
    if len(asked) > 1:
        options = " and ".join("--" + name.replace("_", "-") for name in asked)
        raise UsageError(f"{options} exclude each other", "the command line", "give one of them")
    if asked and values.get("level") == "group":
        option = "--" + asked[0].replace("_", "-")
        raise UsageError(
            f"{option} is of the level participant", "the command line", "leave it out at group"
        )
    _check_adaptation(values)
    if "scan_timeout_minutes" in values and values.get("executor") == "dask":
        raise UsageError(
            "--scan-timeout is for this machine alone", "the command line",
            "set the time limit of the Dask workers instead",
        )  # fmt: skip
    values = dict(values)
    values["validate"] = not values.pop("skip_bids_validation", False)
    for name in TUPLES:
        values[name] = tuple(values.get(name, ()))
    values.setdefault("nprocs", available_cpus())
    if values.get("threads", 0) > values["nprocs"]:
        raise UsageError(
            f"one scan would use {values['threads']} CPUs and the whole run {values['nprocs']}",
            "--omp-nthreads and --nprocs", "lower the first or raise the second",
        )  # fmt: skip
    if (values.get("executor") == "dask") != ("dask" in values):
        raise UsageError(
            "--executor dask and --dask belong together", "the command line",
            "write --executor dask --dask tcp://host:8786, or neither",
        )  # fmt: skip
    return Config(**values)


def _check_adaptation(values: dict[str, Any]) -> None:
    """`--fine-tune` and what belongs to it come together."""
    if values.get("fine_tune") is None:
        lonely = [OPTIONS.get(name, name) for name in ADAPTATION if name in values]
        if lonely:
            raise UsageError(
                f"--{lonely[0]} belongs to an adaptation", "the command line", "add --fine-tune"
            )
        return
    if values.get("labels_dir") is None:
        raise UsageError(
            "--fine-tune has no labels to learn from", "the command line",
            "add --labels DERIVATIVES; RECIPE, if given, follows --fine-tune directly",
        )  # fmt: skip
    for name in ("reports_only", "boilerplate_only"):
        if values.get(name):
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"--fine-tune and {option} exclude each other", "the command line", "drop one"
            )


def available_cpus() -> int:
    """CPUs this process may use: its affinity, and the quota of its container or job."""
    here = getattr(os, "sched_getaffinity", None)
    cpus = len(here(0)) if here else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU.read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus


def check_folders(config: Config) -> None:
    """Refuse folders that would change the input dataset, or whose names no file could tell.

    Raises
    ------
    UsageError
        If the output is the dataset itself or lies in it outside ``derivatives``, or the folder
        for temporary files or the database lies in it; if the path of the dataset or of the output
        is not UTF-8, as tables, pages and the index of the dataset are.
    """
    for name, folder in (("BIDS_DIR", config.bids_dir), ("OUT_DIR", config.out_dir)):
        if not _is_utf8(folder):
            raise UsageError(
                "the name of the folder, or of one above it, is not valid UTF-8",
                f"{name} {folder}", "rename it, or mount it under another path",
            )  # fmt: skip
    bids_dir, out_dir = config.bids_dir.resolve(), config.out_dir.resolve()
    inside = out_dir.is_relative_to(bids_dir)
    if inside and not out_dir.is_relative_to(bids_dir / "derivatives"):
        raise UsageError(
            "the output would be written into the input dataset", f"OUT_DIR {config.out_dir}",
            f"choose {config.bids_dir / 'derivatives' / 'tlseg'}, or a folder outside the dataset",
        )  # fmt: skip
    for option, folder in (("-w", config.work_dir), ("--bids-database-dir", config.database_dir)):
        if folder is not None and folder.resolve().is_relative_to(bids_dir):
            raise UsageError(
                f"{folder} lies in the input dataset", option, "choose a folder outside of it"
            )


def _is_utf8(path: Path) -> bool:
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _run(config: Config) -> int:
    """Prepare the process and hand over to the program."""
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, str(config.threads or config.nprocs))
    for variable in NO_TELEMETRY:
        os.environ[variable] = "1"
    _log(config.verbosity)
    from tlseg_bids import app

    if config.level == "group":
        return app.group(config)
    from tlseg_bids.cli.progress import progress_on

    with progress_on(sys.stderr, config.verbosity) as progress:
        if config.fine_tune is not None:
            return app.fine_tune(config, progress)
        return app.participant(config, progress)


@contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM, with which queues and engines end a process, is the same as Ctrl-C.

    The first process of a container would not hear it at all: it has no default action there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log(verbosity: int) -> None:
    """Warnings to stderr; with -v what the program does, with -vv every detail."""
    logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s", level=logging.ERROR)
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    logging.getLogger("tlseg_bids").setLevel(level)


if __name__ == "__main__":
    sys.exit(main())

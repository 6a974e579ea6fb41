"""``tlseg-run``: the program in its image, with Docker, Podman, Apptainer or Singularity.

Takes the command line of ``tlseg``. Every folder and file on it, and in its ``--config-file``, is
mounted under its own path, the output under where it really lies, so that links in the derivatives
(``DatasetLinks``) hold outside the container too: the dataset read-only, the output to write. The
container has no network, a read-only root file system, no privileges, and works as the caller.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tlseg_bids.cli import options, values
from tlseg_bids.cli.room import check_disk, check_memory
from tlseg_bids.cli.run import make_config, report, until_closed
from tlseg_bids.config import Config
from tlseg_bids.errors import CannotCreateError, NoInputError, TlsegError, UsageError

ENGINES = ("docker", "podman", "apptainer", "singularity")
IMAGE, SIF = "tlseg", "tlseg.sif"
SIGNALLED = 128
"""What a shell adds to the number of the signal that ended a program."""
GPU_DEVICE = Path("/dev/nvidiactl")
PATHS = (values.absolute, values.filters)
"""What options that name a file or folder read it with."""
CACHE_VARIABLE, TEMPLATES_VARIABLE = "TLSEG_CACHE", "TEMPLATEFLOW_HOME"
TAKEN = (
    "bin", "boot", "dev", "etc", "lib", "lib64", "opt/tlseg", "opt/venv", "proc", "run/secrets",
    "sbin", "sys", "usr",
)  # fmt: skip
"""Folders of the image that a mount must not cover."""
DESCRIPTION = """\
Run tlseg in its image: mounts what the command line names (the dataset read-only), passes the GPU,
without network, as you. The other options are those of tlseg (tlseg --help)."""


@dataclass(frozen=True)
class Mount:
    """A file or folder of the host, seen in the container under the same path."""

    path: Path
    writable: bool = False


@dataclass(frozen=True)
class Launch:
    """What is to be run, before it is said in the words of an engine."""

    image: str
    words: tuple[str, ...]
    mounts: tuple[Mount, ...]
    gpu: bool
    network: bool
    user: str
    scratch: Path
    stores: tuple[tuple[str, Path], ...] = ()
    """Folders of what was fetched, each with the variable that names it in the container."""


def parser() -> options.Parser:
    """The launcher's own options; what it does not know is for ``tlseg``."""
    it = options.Parser(
        prog="tlseg-run", description=DESCRIPTION, allow_abbrev=False,
        usage="tlseg-run [option …] BIDS_DIR OUT_DIR LEVEL [option of tlseg …]",
    )  # fmt: skip
    it.add_argument(
        "--engine", choices=("auto", *ENGINES), default="auto",
        help="auto (default): the first of them that is installed",
    )  # fmt: skip
    it.add_argument(
        "--image", help=f"image (default: {IMAGE}), or file of Apptainer (default: {SIF})"
    )
    it.add_argument(
        "--gpu", choices=("auto", "yes", "no"), default="auto",
        help="auto (default): if this machine has an NVIDIA GPU and --device is not cpu",
    )  # fmt: skip
    it.add_argument(
        "--network", action="store_true", help="let the container reach the network (for weights)"
    )
    it.add_argument(
        "--print", "--print-command", action="store_true", dest="show",
        help="print the command and stop",
    )  # fmt: skip
    it.add_argument(
        "--no-checks", action="store_true", help="start even if memory or disk seem too small"
    )
    return it


@until_closed
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tlseg-run``; returns the exit code of the program in the image."""
    try:
        given, words = parser().parse_known_args(sys.argv[1:] if argv is None else list(argv))
        config, emitted, mounts = understand(words)
        engine = find_engine(given.engine)
        launch = Launch(
            image=_image(given.image, engine),
            words=(*emitted, *(() if given.network or config.offline else ("--offline",))),
            mounts=mounts,
            gpu=_wants_gpu(given.gpu, config),
            network=given.network,
            user=f"{os.getuid()}:{os.getgid()}",
            scratch=config.work_dir or Path(tempfile.gettempdir()) / f"tlseg-run-{os.getuid()}",
            stores=_stores(config),
        )
        command = COMMANDS[engine](engine, launch)
        if given.show:
            print(shlex.join(command))
            return 0
        if not given.no_checks:
            check_memory(config)
            check_disk(config)
        _make_folders((launch.scratch, *(m.path for m in mounts if m.writable)))
    except SystemExit as stop:
        return int(stop.code or 0)
    except TlsegError as error:
        return report(error, "tlseg-run")
    try:
        return _until_it_ends(command)
    except OSError as error:
        return report(
            NoInputError(f"{engine} cannot be started ({error.strerror})", command[0], "mend it"),
            "tlseg-run",
        )


def _until_it_ends(command: Sequence[str]) -> int:
    """Start an engine and wait for it; its exit code, as a shell would give it.

    It is left the time to stop its container: Ctrl-C it hears by itself, SIGTERM is handed on.
    """
    engines: list[subprocess.Popen] = []
    told: list[int] = []

    def hand_on() -> None:
        while engines and told:
            engines[0].send_signal(told.pop())

    def terminate(number: int, _: object) -> None:
        told.append(number)  # it may come before the engine is known here
        hand_on()

    heard = {signal.SIGINT: lambda *_: None, signal.SIGTERM: terminate}
    before = {number: signal.signal(number, do) for number, do in heard.items()}
    try:
        with subprocess.Popen(command) as engine:
            engines.append(engine)
            hand_on()
            code = engine.wait()
    finally:
        for number, do in before.items():
            signal.signal(number, do)
    return code if code >= 0 else SIGNALLED - code


def understand(words: Sequence[str]) -> tuple[Config, tuple[str, ...], tuple[Mount, ...]]:
    """A command line of ``tlseg``: what it asks for, itself with absolute paths, and its mounts.

    Raises
    ------
    UsageError
        If ``tlseg`` would refuse it, or a path cannot be mounted.
    NoInputError
        If a file or folder that is read does not exist.
    """
    words = [options.with_hyphens(word) for word in words]
    config = make_config(options.parse(list(words)))
    if config.executor != "local":
        raise UsageError(
            "a container cannot start the workers of a cluster", "--executor",
            "run tlseg itself with --executor dask, and the workers in the image",
        )  # fmt: skip
    it = options.parser()
    given = _as_typed(it, words)
    config = replace(config, out_dir=config.out_dir.resolve())
    given["out_dir"] = str(config.out_dir)
    read = [config.bids_dir, *config.model_dirs, *config.ratings]
    if config.fine_tune and (recipe := values.absolute(config.fine_tune)).is_file():
        given["fine_tune"] = str(recipe)
        read.append(recipe)
    read += [path for path in (config.group_parameters, config.labels_dir) if path is not None]
    read += [Path(given[name]) for name in ("filters", "config_file") if name in given]
    for path in read:
        if not path.exists():
            raise NoInputError("there is no such file or folder", path, "check the path")
    write = [p for p in (config.out_dir, config.work_dir, config.database_dir) if p is not None]
    mounts = [Mount(path) for path in dict.fromkeys(read)]
    mounts += [Mount(path, True) for path in dict.fromkeys(write)]
    for mount in mounts:
        check_mountable(mount.path)
    return config, _emit(it, given), tuple(mounts)


def _as_typed(it: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The command line's values as text, paths absolute, with the paths of its ``--config-file``.

    The container has another working directory and another home, where those would lead astray.
    """
    paths = [action.dest for action in it._actions if action.type in PATHS]
    for action in it._actions:
        if action.type:
            _keep_text(action)
    given = vars(it.parse_args(words))
    if "config_file" in given:
        told = options.read_config_file(Path(given["config_file"]), it, given)
        given |= {name: told[name] for name in paths if not isinstance(told.get(name, {}), dict)}
    return given


def _keep_text(action: argparse.Action) -> None:
    """Let an action check its value and keep what was typed; paths become absolute."""
    check: Callable[[str], Any] = action.type  # type: ignore[assignment]

    def keep(text: str) -> str:
        check(text)
        return str(values.absolute(text)) if check in PATHS else text

    action.type = keep


def _emit(it: argparse.ArgumentParser, given: dict[str, Any]) -> tuple[str, ...]:
    """The command line again, arguments first: no value of theirs can be taken for an option's."""
    words = [given["bids_dir"], given["out_dir"], given["level"]]
    for action in it._actions:
        if not action.option_strings or action.dest not in given:
            continue
        name, value = action.option_strings[-1], given[action.dest]
        if action.nargs == 0:
            words += [name] * int(value)
        else:
            words += [name, *(value if isinstance(value, list) else [value])]
    return tuple(words)


def check_mountable(path: Path) -> None:
    """Refuse a path that no engine can mount, or that would cover the image's own folders.

    Raises
    ------
    UsageError
        With the path.
    """
    text = str(path)
    if not text.isprintable():
        raise UsageError(
            "the path has a line break or a control character", repr(text),
            "rename the folder, or mount it under another name",
        )  # fmt: skip
    parts = path.parts[1:]
    covers = [taken for taken in TAKEN if _overlap(parts, tuple(taken.split("/")))]
    if not parts or covers or parts == ("tmp",):
        raise UsageError(
            f"the path would cover /{covers[0] if covers else '/'.join(parts)} of the image", path,
            "use a folder elsewhere, such as below /home, /data or /scratch",
        )  # fmt: skip


def _overlap(parts: tuple[str, ...], taken: tuple[str, ...]) -> bool:
    """Whether one of the two paths lies in the other."""
    shorter = min(len(parts), len(taken))
    return parts[:shorter] == taken[:shorter]


def find_engine(wanted: str) -> str:
    """The engine asked for, or the first that is installed.

    Raises
    ------
    NoInputError
        If it, or any, is not installed.
    """
    candidates = ENGINES if wanted == "auto" else (wanted,)
    found = [name for name in candidates if shutil.which(name)]
    if not found:
        raise NoInputError(
            f"{' and '.join(candidates)} {'are' if len(candidates) > 1 else 'is'} not installed",
            "PATH", "install an engine, or load its module (module load apptainer)",
        )  # fmt: skip
    return found[0]


def docker_command(engine: str, launch: Launch) -> list[str]:
    """The command line for Docker or Podman."""
    command = [engine, "run", "--rm", "--read-only", "--tmpfs", "/tmp:rw,exec,mode=1777",
               "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
               "--user", launch.user]  # fmt: skip
    if engine == "podman":
        rootless = [] if launch.user.startswith("0:") else ["--userns", "keep-id"]
        command += [*rootless, "--security-opt", "label=disable"]
    if not launch.network:
        command += ["--network", "none"]
    if launch.gpu:
        command += ["--device", "nvidia.com/gpu=all"] if engine == "podman" else ["--gpus", "all"]
    for mount in _with_stores(launch):
        end = () if mount.writable else ("readonly",)
        fields = ("type=bind", f"source={mount.path}", f"target={mount.path}", *end)
        command += ["--mount", _csv(fields)]
    for variable, folder in launch.stores:
        command += ["--env", f"{variable}={folder}"]
    return [*command, launch.image, *launch.words]


def apptainer_command(engine: str, launch: Launch) -> list[str]:
    """The command line for Apptainer or Singularity (3.9 or newer, for ``--mount``)."""
    command = [engine, "run", "--cleanenv", "--containall", "--workdir", str(launch.scratch)]
    if not launch.network:
        command += ["--net", "--network", "none"]
    if launch.gpu:
        command += ["--nv"]
    for mount in _with_stores(launch):
        end = () if mount.writable else ("ro",)
        fields = ("type=bind", f"source={mount.path}", f"destination={mount.path}", *end)
        command += ["--mount", _csv(fields)]
    for variable, folder in launch.stores:
        command += ["--env", f"{variable}={folder}"]
    return [*command, launch.image, *launch.words]


COMMANDS = {
    "docker": docker_command, "podman": docker_command,
    "apptainer": apptainer_command, "singularity": apptainer_command,
}  # fmt: skip


def _with_stores(launch: Launch) -> tuple[Mount, ...]:
    return (*launch.mounts, *(Mount(folder, launch.network) for _, folder in launch.stores))


def _csv(fields: Iterable[str]) -> str:
    """The fields of ``--mount``, which all engines read as a line of CSV (RFC 4180).

    That is why any path can be mounted, also one with the colons, commas or quotes that ``-v`` and
    ``--bind`` would take for their own.
    """
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(fields)
    return stream.getvalue()


def _image(given: str | None, engine: str) -> str:
    """The image's name; a file for Apptainer, unless it names a source (``docker://…``)."""
    if COMMANDS[engine] is docker_command:
        return given or IMAGE
    if given and "://" in given:
        return given
    path = values.absolute(given or SIF)
    if not path.is_file():
        raise NoInputError(
            "there is no such image", path, "build it (docs/container.md), or name it with --image"
        )
    return str(path)


def _wants_gpu(asked: str, config: Config) -> bool:
    if asked == "auto":
        return config.device.startswith("cuda") or (config.device == "auto" and GPU_DEVICE.exists())
    return asked == "yes"


def _stores(config: Config) -> tuple[tuple[str, Path], ...]:
    """The folders of fetched weights and, where templates are asked for, of TemplateFlow.

    Only those that are there: without its own folder TemplateFlow takes what the image brings.
    """
    from tlseg_bids.zoo.weights import cache_dir

    stores = [(CACHE_VARIABLE, cache_dir().absolute())]
    home = os.environ.get(TEMPLATES_VARIABLE)
    if home and config.output_spaces:
        stores.append((TEMPLATES_VARIABLE, Path(home).absolute()))
    return tuple((variable, folder) for variable, folder in stores if folder.is_dir())


def _make_folders(folders: Iterable[Path]) -> None:
    """Make what is written to: an engine would make it as root, or not at all."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotCreateError(
                f"the folder cannot be made ({error.strerror})", folder, "choose another one"
            ) from error


if __name__ == "__main__":
    sys.exit(main())

"""The command line: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import tomllib
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

import tlseg_bids
from tlseg_bids.cli import run
from tlseg_bids.cli.options import file_keys, parse, parser
from tlseg_bids.cli.progress import Bars, Lines, Progress, progress_on
from tlseg_bids.config import ADAPTATION, Config
from tlseg_bids.errors import ScanError

ROOT = Path(tlseg_bids.__file__).parents[1]
HEAVY = {"torch", "numpy", "pandas", "nibabel", "nilearn", "bids", "niworkflows", "scipy", "jinja2",
         "matplotlib", "safetensors", "tqdm", "tomli_w", "platformdirs"}  # fmt: skip
LIST_HEAVY = f"import sys; print(sorted({HEAVY!r} & set(sys.modules)))"


@pytest.fixture
def app(monkeypatch):
    """A stand-in for the program that keeps what it was asked and answers with an exit code."""
    it = types.ModuleType("tlseg_bids.app")
    it.configs, it.answer = [], 0

    def participant(config, progress):
        assert isinstance(progress, Progress)
        it.configs.append(config)
        if isinstance(it.answer, BaseException):
            raise it.answer
        return it.answer

    it.participant = it.fine_tune = participant
    monkeypatch.setitem(sys.modules, "tlseg_bids.app", it)
    monkeypatch.setattr(tlseg_bids, "app", it, raising=False)
    for variable in run.THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return it


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "bids").mkdir()
    return [str(tmp_path / "bids"), str(tmp_path / "out"), "participant"]


def asked(app, arguments) -> Config:
    assert run.main(arguments) == 0
    return app.configs[-1]


def refused(capsys, arguments, code) -> str:
    """The one line on stderr that refuses `arguments`."""
    assert run.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tlseg: ")
    assert err.count("\n") == 1
    return err


# --- light ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["a", "b", "nonsense"], ["a", "b", "participant", "--x"]]
)
def test_nothing_heavy_is_imported_to_answer_a_question_of_usage(words):
    code = f"from tlseg_bids.cli.run import main; main({words!r}); {LIST_HEAVY}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_zoo_answers_help_without_anything_heavy():
    code = f"from tlseg_bids.cli.zoo import main; main(['--help']); {LIST_HEAVY}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_check_for_heavy_modules_can_fail():
    done = subprocess.run(
        [sys.executable, "-c", f"import numpy; {LIST_HEAVY}"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "['numpy']"


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_runs_as_a_module(command):
    module = SCRIPTS[command].partition(":")[0]
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT,
        check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"usage: {command} ")


def test_the_entry_point_is_the_same_program():
    entry = [sys.executable, str(ROOT / "bids_app_entry.py")]
    done = subprocess.run([*entry, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tlseg {tlseg_bids.__version__}\n"
    done = subprocess.run([*entry, "a", "b", "c"], capture_output=True, text=True, check=False)
    assert done.returncode == 17
    assert done.stderr == "tlseg: unknown level 'c' – third argument – use participant or group\n"


def test_help_names_every_exit_code(capsys):
    assert run.main(["--help"]) == 0
    text = capsys.readouterr().out
    for code in (0, 1, 16, 17, 18, 64, 65, 66, 73, 74, 75):
        assert f"{code} " in text[text.index("exit codes") :]


# --- what is asked ----------------------------------------------------------------------------


def test_defaults_are_those_of_config(app, folders, monkeypatch):
    monkeypatch.setattr(run, "available_cpus", lambda: 3)
    config = asked(app, folders)
    assert config == Config(Path(folders[0]), Path(folders[1]), "participant", nprocs=3)


EVERY = [
    "--participant-label", "sub-01", "02", "--session-label", "ses-a", "--bids-filter-file", "F",
    "--bids-database-dir", "db", "--skip-bids-validation", "--multi-run", "first", "--shard", "2/8",
    "--age", "6 months", "--model", "any", "--models", "m1", "m2", "--licence", "permissive",
    "--protocol", "braincolor",
    "--offline", "--device", "cuda:1", "--nprocs", "8", "--omp-nthreads", "4", "--mem", "12.5G",
    "-w", "work", "--dry-run", "--probabilities", "--compat",
    "--output-spaces", "MNI152NLin6Asym", "MNIInfant:cohort-1",
    "--stop-on-first-crash", "--random-seed", "7",
    "-vv", "--volume", "soft", "--icv-correction", "ratio", "--head-size", "brain",
    "--combat", "site", "--combat-covariates", "age_years", "sex", "--combat-reference", "A",
    "--fit-where", "dx=hc",
    "--group-parameters", "p.json", "--ratings", "r1", "r2",
    "--executor", "dask", "--dask", "tcp://host:8786",
]  # fmt: skip


@pytest.fixture
def everything(tmp_path, folders, monkeypatch):
    """A command line with every option that can stand beside the others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "F").write_text('{"t1w": {"session": "a"}}')
    return folders + EVERY


def test_every_option_arrives(app, everything, tmp_path):
    config = asked(app, everything)
    assert config == Config(
        bids_dir=tmp_path / "bids", out_dir=tmp_path / "out", level="participant",
        participants=("01", "02"), sessions=("a",), filters={"t1w": {"session": "a"}},
        database_dir=tmp_path / "db", validate=False, work_dir=tmp_path / "work", nprocs=8,
        threads=4, memory_gib=12.5, device="cuda:1", model="any",
        model_dirs=(tmp_path / "m1", tmp_path / "m2"), licence="permissive",
        protocol="braincolor", age="6 months",
        multi_run="first", shard=(2, 8), dry_run=True, stop_on_first_crash=True, random_seed=7,
        executor="dask", dask="tcp://host:8786",
        verbosity=2, offline=True, probabilities=True, compat=True,
        output_spaces=("MNI152NLin6Asym", "MNIInfant:cohort-1"), command=config.command,
        volume="soft",
        icv_correction="ratio", head_size="brain", combat="site",
        combat_covariates=("age_years", "sex"), combat_reference="A", fit_where=("dx=hc",),
        group_parameters=tmp_path / "p.json", ratings=(tmp_path / "r1", tmp_path / "r2"),
    )  # fmt: skip
    assert config.command.startswith("tlseg ")
    assert "--age '6 months'" in config.command
    untouched = {"scan_timeout_minutes", "reports_only", "boilerplate_only", "level", *ADAPTATION}
    defaults = Config(config.bids_dir, config.out_dir, "participant")
    for field in dataclasses.fields(Config):
        same = getattr(config, field.name) == getattr(defaults, field.name)
        assert same == (field.name in untouched | {"bids_dir", "out_dir"}), field.name


def test_a_run_written_as_toml_is_the_same_run_again(app, everything, folders, tmp_path):
    config = asked(app, everything)
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())
    assert asked(app, [*folders, "--config-file", str(file)]) == config
    plain = asked(app, folders)
    file.write_text(plain.to_toml())
    assert asked(app, [*folders, "--config-file", str(file)]) == plain


def test_a_path_cannot_break_out_of_the_comment_of_the_toml():
    config = Config(Path("/a\nmodel = 'x'"), Path("/b"), "participant")
    assert config.to_toml().count("\n") == config.to_toml().strip().count("\n") + 1
    assert "\nmodel" not in config.to_toml()


def test_underscores_are_hyphens_and_values_stay(app, folders):
    config = asked(app, [*folders, "--participant_label", "01", "--age=3_4"])
    assert config.participants == ("01",)
    assert config.age == "3_4"


def test_the_command_line_wins_over_the_file(app, folders, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('participant-label = "01"\nrandom_seed = 3\nnprocs = 2\noffline = true\n')
    config = asked(app, [*folders, "--config-file", str(file), "--participant-label", "02"])
    assert config.participants == ("02",)
    assert (config.random_seed, config.nprocs, config.offline) == (3, 2, True)
    file.write_text('bids-filter-file = "gone.json"\n')
    filters = tmp_path / "f.json"
    filters.write_text('{"t1w": {"run": 1}}')
    words = [*folders, "--config-file", str(file), "--bids-filter-file", str(filters)]
    assert asked(app, words).filters == {"t1w": {"run": 1}}


@pytest.mark.parametrize(
    ("text", "gib"), [("8G", 8), ("8GB", 8), ("8 GiB", 8), ("8192", 8), ("8192M", 8), ("1T", 1024)]
)
def test_amounts_of_memory(app, folders, text, gib):
    assert asked(app, [*folders, "--mem", text]).memory_gib == gib


def test_how_many_scans_at_once():
    config = Config(Path("/a"), Path("/b"), "participant", nprocs=8, threads=2)
    assert config.at_once(3.0) == 4
    assert dataclasses.replace(config, memory_gib=7.0).at_once(3.0) == 2
    assert dataclasses.replace(config, memory_gib=1.0).at_once(3.0) == 1
    assert dataclasses.replace(config, threads=0).at_once(3.0) == 1


@pytest.mark.parametrize(
    ("scans", "memory", "free", "threads"),
    [
        (1, None, 100, 8), (3, None, 100, 2), (8, None, 100, 1), (80, None, 100, 1),
        (80, 7.0, 100, 4), (80, None, 14, 2), (80, None, None, 1), (80, None, 1, 8),
        (0, None, 9, 8),
    ],
)  # fmt: skip
def test_scans_share_the_cpus_as_far_as_memory_goes(scans, memory, free, threads):
    config = Config(Path("/a"), Path("/b"), "participant", nprocs=8, memory_gib=memory)
    assert config.shared_out(scans, 3.0, free).threads == threads
    many = dataclasses.replace(config, nprocs=64)
    assert 64 // many.shared_out(scans, 3.0, free).threads <= 8
    asked_for = dataclasses.replace(config, threads=3)
    assert asked_for.shared_out(scans, 3.0, free) is asked_for


def test_cpus_of_a_container_are_counted(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(run, "CGROUP_CPU", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert run.available_cpus() == 64
    for text, cpus in (("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1)):
        quota.write_text(text)
        assert run.available_cpus() == cpus


def test_threads_of_the_libraries_are_set(app, folders):
    asked(app, [*folders, "--nprocs", "4", "--omp-nthreads", "2"])
    assert os.environ["OMP_NUM_THREADS"] == "2"
    for variable in run.THREAD_VARIABLES:
        del os.environ[variable]


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devise", "cpu"], "unrecognized arguments: --devise cpu"),
        (["--part", "01"], "unrecognized arguments: --part"),
        (["--device", "gpu"], "'gpu' is none of auto, cpu, cuda, cuda:N, mps"),
        (["--participant-label", "0_1"], "'0_1' is no BIDS label"),
        (["--participant-label", "01,02"], "labels are letters and digits, separated by spaces"),
        (["--session-label", "../x"], "'../x' is no BIDS label"),
        (["--shard", "3/2"], "'3/2' is not I/N with 1 ≤ I ≤ N"),
        (["--shard", "0/2"], "'0/2' is not I/N"),
        (["--nprocs", "0"], "'0' is not a whole number of at least 1"),
        (["--nprocs", "two"], "'two' is not a whole number"),
        (["--random-seed", "-1"], "not a whole number from 0"),
        (["--random-seed", "4294967296"], "not a whole number from 0 to 4294967295"),
        (["--mem", "8"], "'8' is 0.00781 GiB, less than the 0.5 GiB"),
        (["--mem", "much"], "'much' is not an amount of memory, such as 8G"),
        (["--multi-run", "best"], "invalid choice: 'best'"),
        (["-w", ""], "the path is empty"),
        (["-w", "~nobody-here/x"], "there is no home folder ~nobody-here; write the path in full"),
        (["--dry-run", "--reports-only"], "--dry-run and --reports-only exclude each other"),
        (["--nprocs", "1", "--omp-nthreads", "2"], "one scan would use 2 CPUs and the whole run 1"),
    ],
)
def test_wrong_usage_is_64(app, folders, capsys, words, message):
    line = refused(capsys, folders + words, 64)
    assert message in line
    assert line.count(" – ") == 2
    assert app.configs == []


def test_missing_arguments_are_64(capsys):
    assert "required: BIDS_DIR, OUT_DIR" in refused(capsys, [], 64)


def test_an_unknown_level_is_17(capsys, folders):
    line = refused(capsys, [*folders[:2], "session"], 17)
    assert line == "tlseg: unknown level 'session' – third argument – use participant or group\n"


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ('participant-labels = "01"', 64, "unknown key 'participant-labels' – "),
        ('participant-labels = "01"', 64, "did you mean 'participant-label'?"),
        ("zzz = 1", 64, "known are verbose, participant-label"),
        ("nprocs = 0", 64, "'0' is not a whole number of at least 1 – "),
        ("nprocs = [1]", 64, "[1] is not one value"),
        ("offline = 1", 64, "1 is not true or false"),
        ("verbose = true", 64, "True is not an integer"),
        ('licence = "free"', 64, "'free' is no choice"),
        ("[participant-label]\nx = 1", 64, "is not one value"),
        ("bids-filter-file = {t1w = 1}", 65, "the filters are not an object of objects"),
        ("nprocs = ", 65, "the configuration file is not TOML"),
        ("config-file = 'x'", 64, "unknown key 'config-file'"),
    ],
)
def test_a_wrong_configuration_file(capsys, folders, tmp_path, content, code, message):
    file = tmp_path / "c.toml"
    file.write_text(content)
    line = refused(capsys, [*folders, "--config-file", str(file)], code)
    assert message in line
    assert str(file) in line


def test_files_that_are_not_there_are_66(capsys, folders):
    for option in ("--config-file", "--bids-filter-file"):
        line = refused(capsys, [*folders, option, "/no/such/file"], 66)
        assert "cannot be read (No such file or directory) – /no/such/file – correct the" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "the filter file is not JSON"), ("[]", "the filters are not an object of objects"),
     ('{"t1w": 3}', "the filters are not an object of objects")],
)  # fmt: skip
def test_a_wrong_filter_file_is_65(capsys, folders, tmp_path, content, message):
    (tmp_path / "f.json").write_text(content)
    line = refused(capsys, [*folders, "--bids-filter-file", str(tmp_path / "f.json")], 65)
    assert message in line


@pytest.mark.parametrize(("place", "name"), [(0, "BIDS_DIR"), (1, "OUT_DIR")])
@pytest.mark.parametrize("level", ["participant", "group"])
def test_a_folder_whose_name_is_not_utf8_is_refused(app, capsys, folders, place, name, level):
    latin1 = os.fsdecode(os.fsencode(folders[place]) + b"/\xe9tude/x")
    Path(latin1).mkdir(parents=True)
    words = [*folders[:place], latin1, *folders[place + 1 : 2], level]
    line = refused(capsys, words, 64)
    assert "the name of the folder, or of one above it, is not valid UTF-8" in line
    assert f" – {name} {folders[place]}/\\udce9tude/x – rename it, or mount it under" in line
    assert app.configs == []
    assert list(Path(latin1).iterdir()) == []


def test_nothing_may_be_written_into_the_dataset(app, capsys, folders, tmp_path):
    bids = folders[0]
    for out in (bids, f"{bids}/out", f"{bids}/sub-01/../x"):
        line = refused(capsys, [bids, out, "participant"], 64)
        assert "would be written into the input dataset – OUT_DIR" in line
        assert f"choose {bids}/derivatives/tlseg" in line
    (tmp_path / "link").symlink_to(bids)
    refused(capsys, [bids, str(tmp_path / "link"), "participant"], 64)
    line = refused(capsys, [*folders, "-w", f"{bids}/work"], 64)
    assert f"{bids}/work lies in the input dataset – -w – choose" in line
    refused(capsys, [*folders, "--bids-database-dir", bids], 64)
    assert asked(app, [bids, f"{bids}/derivatives/tlseg", "participant"])


# --- how it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1])
def test_the_program_decides_the_exit_code(app, folders, code):
    app.answer = code
    assert run.main(folders) == code


def test_an_error_is_one_line_and_a_traceback_from_vv_on(app, folders, capsys):
    app.answer = ScanError("a line\nbreak and \x1b[31m", "here", "do that")
    assert run.main(folders) == 1
    assert capsys.readouterr().err == "tlseg: a line\\nbreak and \\x1b[31m – here – do that\n"
    assert run.main([*folders, "-v"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert run.main([*folders, "-vv"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "tlseg: a line\\nbreak" in err


def test_control_c(app, folders, capsys):
    app.answer = KeyboardInterrupt()
    assert run.main(folders) == 130
    told = "tlseg: stopped; finished scans are kept, and the same command goes on from there\n"
    assert capsys.readouterr().err == told


def test_sigterm_is_control_c(app, folders, capsys):
    """A container's first process would not hear it."""

    def told(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return 0

    before, app.participant = signal.getsignal(signal.SIGTERM), told
    assert run.main(folders) == 130
    assert "stopped; finished scans are kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    app.participant = lambda *_: 7
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run.main, folders).result() == 7, "elsewhere no handler can be set"


def test_what_the_system_refuses_is_a_sentence(app, folders, capsys):
    app.answer = OSError(5, "Input/output error", "/data/gone")
    assert run.main(folders) == 74
    said = capsys.readouterr().err
    assert said.startswith("tlseg: reading or writing failed (Input/output error) – /data/gone – ")
    app.answer = PermissionError(13, "Permission denied", "/data/closed")
    assert run.main(folders) == 74
    assert "(Permission denied) – /data/closed – give the user who runs this access" in (
        capsys.readouterr().err
    )
    for lacking in (MemoryError(), RuntimeError("can't start new thread")):
        app.answer = lacking
        assert run.main(folders) == 74
        assert "not enough memory – free some" in capsys.readouterr().err
    assert os.environ["RUST_BACKTRACE"] == "0", "with one, safetensors can wait for itself"
    app.answer = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        run.main(folders)


@pytest.mark.parametrize("value", ["0", "-1", "soon"])
def test_a_time_limit_that_is_none(app, folders, capsys, value):  # noqa: ARG001
    assert run.main([*folders, "--scan-timeout", value]) == 64
    assert "--scan-timeout" in capsys.readouterr().err


def test_a_time_limit_arrives(app, folders):
    assert asked(app, [*folders, "--scan-timeout", "7.5"]).scan_timeout_minutes == 7.5


def test_a_defect_of_the_program_is_not_hidden(app, folders):
    app.answer = ZeroDivisionError("defect")
    with pytest.raises(ZeroDivisionError):
        run.main(folders)


# --- the grammar itself -----------------------------------------------------------------------


def test_every_option_has_help_and_every_field_an_option():
    it = parser()
    assert all(action.help for action in it._actions)
    fields = {field.name for field in dataclasses.fields(Config)}
    unset = fields - {action.dest for action in it._actions}
    assert unset == {"validate", "command"}


def test_the_file_knows_every_long_option():
    long = {o for a in parser()._actions for o in a.option_strings if o.startswith("--")}
    assert {f"--{key}" for key in file_keys(parser())} == long - {
        "--help",
        "--version",
        "--config-file",
    }


def test_paths_are_absolute_and_links_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert parse(["link", "~/out", "participant"])["bids_dir"] == tmp_path / "link"
    assert parse(["link", "~/out", "participant"])["out_dir"] == Path.home() / "out"


def test_filters_may_stand_in_the_configuration_file(app, folders, tmp_path):
    content = {"t1w": {"acquisition": ["mprage", None]}}
    (tmp_path / "f.json").write_text(json.dumps(content))
    config = asked(app, [*folders, "--bids-filter-file", str(tmp_path / "f.json")])
    assert config.filters == content
    (tmp_path / "c.toml").write_text('bids-filter-file = {t1w = {acquisition = "mprage"}}')
    config = asked(app, [*folders, "--config-file", str(tmp_path / "c.toml")])
    assert config.filters == {"t1w": {"acquisition": "mprage"}}


def test_a_filter_with_null_is_written_as_toml_and_read_as_the_same(app, folders, tmp_path):
    from tlseg_bids.bids import layout

    (tmp_path / "f.json").write_text('{"t1w": {"acquisition": null, "run": [1, null]}, "t2w": {}}')
    config = asked(app, [*folders, "--bids-filter-file", str(tmp_path / "f.json")])
    (tmp_path / "run.toml").write_text(config.to_toml())
    again = asked(app, [*folders, "--config-file", str(tmp_path / "run.toml")])
    assert again.filters == {
        "t1w": {"acquisition": "Query.NONE", "run": [1, "Query.NONE"]}, "t2w": {}
    }  # fmt: skip
    assert layout._filters(again.filters) == layout._filters(config.filters)


# --- progress ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 77


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 100 columns that keeps what is drawn on it."""
    monkeypatch.setenv("TERM", "xterm")
    sizes = {77: os.terminal_size((100, 30))}
    monkeypatch.setattr(os, "get_terminal_size", lambda fd=0: sizes[fd])
    it = Terminal()
    it.sizes = sizes
    return it


def walk(progress: Progress) -> None:
    with progress:
        progress.begin(2)
        progress.step("sub-01_T1w", "read", 1, 2)
        progress.step("sub-02_T1w", "read", 1, 2)
        progress.step("sub-01_T1w", "segment", 2, 2)
        progress.finish("sub-01_T1w", "done")
        progress.finish("sub-02_T1w", "failed", "NaN\n\x1b[31m")


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    walk(progress_on(stream))
    assert stream.getvalue().splitlines() == [
        "2 scans",
        "[1/2] sub-01_T1w done in 0 s",
        "[2/2] sub-02_T1w failed in 0 s: NaN\\n\\x1b[31m",
    ]


def test_a_model_to_adapt_is_counted_but_is_no_scan():
    stream = io.StringIO()
    with progress_on(stream) as progress:
        progress.begin(1, models=1)
        progress.finish("sub-01_T1w", "done")
        progress.finish("lab", "done")
    assert stream.getvalue().splitlines() == [
        "1 scan and 1 model to adapt", "[1/2] sub-01_T1w done", "[2/2] lab done",
    ]  # fmt: skip


def test_verbose_lines_tell_every_step():
    stream = io.StringIO()
    walk(progress_on(stream, verbosity=1))
    assert "sub-01_T1w: segment (2/2)" in stream.getvalue().splitlines()


def test_bars_on_a_terminal(terminal):
    progress = progress_on(terminal)
    assert isinstance(progress, Bars)
    walk(progress)
    text = terminal.getvalue()
    assert "\r" in text
    for part in ("scans", "segment  sub-01_T1w", "sub-02_T1w failed: NaN\\n\\x1b[31m", "2/2"):
        assert part in text


def test_a_dumb_or_verbose_terminal_or_one_without_width_gets_lines(terminal, monkeypatch):
    assert isinstance(progress_on(terminal, verbosity=1), Lines)
    terminal.sizes[77] = os.terminal_size((0, 0))
    assert isinstance(progress_on(terminal), Lines)
    terminal.sizes[77] = os.terminal_size((80, 24))
    assert isinstance(progress_on(terminal), Bars)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_on(terminal), Lines)


def test_messages_stand_above_the_bars_and_many_threads_may_report(terminal):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with progress_on(terminal) as progress, ThreadPoolExecutor(8) as pool:
            progress.begin(40)
            assert handler not in logging.getLogger().handlers
            for number in range(40):
                pool.submit(progress.step, f"scan{number}", "read", 1, 2)
                pool.submit(progress.finish, f"scan{number}", "done")
        assert handler in logging.getLogger().handlers
    finally:
        logging.getLogger().removeHandler(handler)
    assert terminal.getvalue().count(" done") == 40
    assert "40/40" in terminal.getvalue()


# --- adaptation -------------------------------------------------------------------------------

ADAPT = ["--fine-tune", "--labels", "l", "--name", "lab", "--base", "any", "--budget", "7.5"]


def test_the_options_of_an_adaptation_arrive(app, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = asked(app, folders + ADAPT)
    assert (config.fine_tune, config.site, config.base) == ("auto", "lab", "any")
    assert (config.labels_dir, config.budget_minutes) == (tmp_path / "l", 7.5)
    assert asked(app, [*folders, "--fine-tune", "careful", "--labels", "l"]).fine_tune == "careful"
    file = tmp_path / "again.toml"
    file.write_text(config.to_toml())
    again = asked(app, [*folders, "--config-file", str(file)])
    assert dataclasses.replace(again, command=config.command) == config
    file.write_text('fine-tune = true\nlabels = "l"\n')
    assert asked(app, [*folders, "--config-file", str(file)]).fine_tune == "auto"


def test_options_of_an_adaptation_come_together(app, folders, capsys):
    err = refused(capsys, [*folders, "--labels", "l"], 64)
    assert "--labels belongs to an adaptation" in err and "add --fine-tune" in err
    err = refused(capsys, [*folders, "--fine-tune"], 64)
    assert "no labels to learn from" in err and "--labels DERIVATIVES" in err
    err = refused(capsys, [*folders, *ADAPT, "--reports-only"], 64)
    assert "--fine-tune and --reports-only exclude each other" in err
    err = refused(capsys, [*folders, *ADAPT, "--name", "../up"], 64)
    assert "'../up' cannot name a model" in err
    err = refused(capsys, [*folders, *ADAPT, "--budget", "0"], 64)
    assert "'0' is not a number of minutes" in err
    assert app.configs == []


def test_a_reader_that_has_enough_ends_a_table_quietly():
    """As in ``tlseg-zoo list | head``."""
    code = "import sys; from tlseg_bids.cli.zoo import main; sys.exit(main(['list']))"
    asked = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    asked.stdout.close()
    said = asked.stderr.read()
    assert (asked.wait(), said) == (141, "")


PLAN = """
import sys, types, tlseg_bids
from tlseg_bids.cli.run import main
app = sys.modules["tlseg_bids.app"] = tlseg_bids.app = types.ModuleType("tlseg_bids.app")
app.participant = lambda *_: print("a scan", flush={flush}) or 0
sys.exit(main(["bids", "out", "participant", "--dry-run"]))
"""


@pytest.mark.parametrize("flush", [False, True])
def test_a_reader_that_has_enough_of_the_plan_is_no_error_of_the_disk(flush):
    """As in ``tlseg … --dry-run | head``, whether the lines were held back or not."""
    asked = subprocess.Popen(
        [sys.executable, "-c", PLAN.format(flush=flush)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    asked.stdout.close()
    said = asked.stderr.read()
    assert (asked.wait(), said) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("flush", [False, True])
def test_a_plan_for_which_the_disk_is_full_is_a_sentence(flush):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PLAN.format(flush=flush)],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 74
    assert "reading or writing failed (No space left on device) – check the disk" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("words", ["cli.run import main; main(['--help'])",
                                   "cli.zoo import main; main(['list'])"])  # fmt: skip
def test_a_terminal_without_utf_8_is_printed_to(encoding, words):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from tlseg_bids.{words[:-1]}) or sys.exit(3)"],
        env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, b"")
    assert b"\\u2" in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_without_streams_runs_and_lends_their_numbers_to_no_file(closed, tmp_path):
    code = PLAN.format(flush=True).replace(
        'print("a scan", flush=True)',
        f"open({str(tmp_path / 'file')!r}, 'w').write(str(__import__('os').open('.', 0)))",
    ).replace("or 0", "and 0")  # fmt: skip
    line = f'"{sys.executable}" -c "$CODE" {closed}'
    done = subprocess.run(["sh", "-c", line], env={**os.environ, "CODE": code}, check=False)
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


def test_a_user_without_a_home_folder_gets_one(app, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("HOME")
    unknown = Mock(side_effect=KeyError("uid not found"))
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run.main(["bids", "out", "participant"]) == 0
    assert len(app.configs) == 1
    assert Path.home() == tmp_path / f"tlseg-{os.getuid()}"

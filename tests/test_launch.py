"""`tlseg-run`: the command line that each engine gets, and what is checked before it starts."""

from __future__ import annotations

import csv
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.datasets import make_dataset
from tlseg_bids import resources
from tlseg_bids.cli import launch, options
from tlseg_bids.cli.run import make_config

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "my data: 50%, \"a\" 'b' $HOME ; & ü"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A dataset, an output that is not there yet, no cache, no GPU, every engine installed."""
    monkeypatch.setenv("TLSEG_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(launch, "GPU_DEVICE", tmp_path / "no-gpu")
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(launch.os, "getuid", lambda: 1234)
    monkeypatch.setattr(launch.os, "getgid", lambda: 567)
    (tmp_path / "tlseg.sif").touch()
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "bids")
    return tmp_path


def printed(capsys, *words: object) -> list[str]:
    """The command that ``--print`` shows, as a list."""
    assert launch.main(["--print", *map(str, words)]) == 0
    return shlex.split(capsys.readouterr().out)


def refused(capsys, code: int, *words: object) -> str:
    """The one line of a refusal."""
    assert launch.main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tlseg-run: ")
    assert err.count("\n") == 1
    return err


def mounts(command: list[str]) -> list[dict[str, str]]:
    """The fields of every ``--mount``."""
    given = [command[n + 1] for n, word in enumerate(command) if word == "--mount"]
    rows = [next(csv.reader([text])) for text in given]
    return [{f.partition("=")[0]: f.partition("=")[2] for f in row} for row in rows]


def test_docker(place, capsys):
    command = printed(capsys, "--engine", "docker", "bids", "out", "participant", "--device", "cpu")
    assert command == [
        "docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp:rw,exec,mode=1777",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "1234:567",
        "--network", "none",
        "--mount", f"type=bind,source={place}/bids,target={place}/bids,readonly",
        "--mount", f"type=bind,source={place}/out,target={place}/out",
        "tlseg", f"{place}/bids", f"{place}/out", "participant", "--device", "cpu", "--offline",
    ]  # fmt: skip
    assert not (place / "out").exists(), "--print changes nothing"


def test_the_output_is_mounted_where_it_really_lies(place, capsys):
    real = place / "x" / "y" / "scratch"
    real.mkdir(parents=True)
    (place / "scratch").symlink_to(real)
    (place / "data").symlink_to(place / "bids")
    command = printed(capsys, "--engine", "docker", "data", "scratch/out", "participant")
    assert command[-4:] == [f"{place}/data", f"{real}/out", "participant", "--offline"]
    assert [mount["target"] for mount in mounts(command)] == [f"{place}/data", f"{real}/out"]


@pytest.mark.usefixtures("place")
def test_podman_maps_the_caller_to_himself_unless_he_is_root(capsys, monkeypatch):
    command = printed(capsys, "--engine", "podman", "bids", "out", "participant", "--device=cuda")
    text = shlex.join(command)
    assert "--userns keep-id" in text
    assert "--device nvidia.com/gpu=all" in text
    assert "--gpus" not in text
    assert command[-3:] == ["--device", "cuda", "--offline"]
    monkeypatch.setattr(launch.os, "getuid", lambda: 0)
    assert "keep-id" not in printed(capsys, "--engine", "podman", "bids", "out", "participant")


@pytest.mark.parametrize("engine", ["apptainer", "singularity"])
def test_apptainer(place, capsys, engine):
    command = printed(
        capsys, "--engine", engine, "bids", "out", "participant", "--device", "cuda:1", "-w", "w"
    )
    assert command == [
        engine, "run", "--cleanenv", "--containall", "--workdir", f"{place}/w",
        "--net", "--network", "none", "--nv",
        "--mount", f"type=bind,source={place}/bids,destination={place}/bids,ro",
        "--mount", f"type=bind,source={place}/out,destination={place}/out",
        "--mount", f"type=bind,source={place}/w,destination={place}/w",
        f"{place}/tlseg.sif", f"{place}/bids", f"{place}/out", "participant",
        "--device", "cuda:1", "--work-dir", f"{place}/w", "--offline",
    ]  # fmt: skip


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_a_hostile_path_arrives_whole(place, capsys, engine):
    bids = make_dataset(place / HOSTILE)
    command = printed(capsys, "--engine", engine, bids, place / "out", "participant")
    sources = [mount["source"] for mount in mounts(command)]
    assert sources == [str(bids), f"{place}/out"]
    assert command.count(str(bids)) == 1
    assert all(word != "-v" and word != "--bind" for word in command)


def test_every_path_of_the_command_line_is_mounted_and_absolute(place, capsys):
    (place / "m").mkdir()
    (place / "f.json").write_text("{}")
    (place / "c.toml").write_text(f'models = ["{place}/more"]\nmem = "8G"\n')
    (place / "more").mkdir()
    words = ("bids", "out", "participant", "--bids-filter-file", "f.json", "--config-file",
             "c.toml", "--bids-database-dir", "db", "-vv", "--shard", "2/8")  # fmt: skip
    command = printed(capsys, "--engine", "docker", *words)
    seen = {mount["source"]: "readonly" not in mount for mount in mounts(command)}
    readonly = ("bids", "more", "f.json", "c.toml")
    assert seen == {
        **{f"{place}/{n}": False for n in readonly},
        **{f"{place}/{n}": True for n in ("out", "db")},
    }
    said = command[command.index("tlseg") + 1 :]
    assert f"{place}/f.json" in said
    assert f"{place}/db" in said
    assert said.count("--verbose") == 2
    assert said[said.index("--shard") + 1] == "2/8"
    again = printed(capsys, "--engine", "docker", *words[:3], "--models", "m", "--mem", "4096")
    assert again[-5:] == ["--models", f"{place}/m", "--mem-mb", "4096", "--offline"]


def test_paths_of_a_configuration_file_arrive_as_those_of_the_command_line(
    place, capsys, monkeypatch
):
    home = place / "home"
    monkeypatch.setenv("HOME", str(home))
    for folder in ("m", "home/more", "labels"):
        (place / folder).mkdir(parents=True)
    for file in ("f.json", "g.json", "home/recipe.toml"):
        (place / file).write_text("{}")
    (place / "c.toml").write_text(
        'bids-filter-file = "f.json"\nmodels = ["m", "~/more"]\nlabels = "labels"\n'
        'fine-tune = "~/recipe.toml"\nwork-dir = "w"\nbids_database_dir = "~/db"\nmem = "8G"\n'
    )
    words = ("--engine", "docker", "bids", "out", "participant", "--config-file", "c.toml")
    command = printed(capsys, *words)
    seen = {mount["source"]: "readonly" not in mount for mount in mounts(command)}
    read = ("bids", "c.toml", "f.json", "m", "home/more", "labels", "home/recipe.toml")
    assert seen == {
        **{f"{place}/{name}": False for name in read},
        **{f"{place}/{name}": True for name in ("out", "w", "home/db")},
    }
    said = command[command.index("tlseg") + 1 : -1]
    here = make_config(options.parse(list(words[2:])))
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    monkeypatch.setenv("HOME", "/")
    there = make_config(options.parse(said))
    recipe = str(home / "recipe.toml")
    assert there == replace(here, fine_tune=recipe)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(home))
    command = printed(capsys, *words, "--bids-filter-file", "g.json")
    assert f"{place}/g.json" in command
    assert f"{place}/f.json" not in command


def test_filters_that_stand_in_a_configuration_file_stay_there(place, capsys):
    (place / "c.toml").write_text('[bids-filter-file.t1w]\nsession = "01"\n')
    command = printed(
        capsys, "--engine", "docker", "bids", "out", "participant", "--config-file", "c.toml"
    )
    assert command[-3:] == ["--config-file", f"{place}/c.toml", "--offline"]


@pytest.mark.usefixtures("place")
def test_a_file_that_a_configuration_file_names_and_is_not_there_is_a_sentence(capsys, tmp_path):
    (tmp_path / "c.toml").write_text('models = "gone"\n')
    said = refused(capsys, 66, "bids", "out", "participant", "--config-file", "c.toml")
    assert f"there is no such file or folder – {tmp_path}/gone – check the path" in said


def test_what_an_adaptation_reads_is_mounted(place, capsys):
    (place / "labels").mkdir()
    (place / "recipe.toml").touch()
    words = ("--engine", "docker", "bids", "out", "participant", "--labels", "labels")
    command = printed(capsys, *words, "--fine-tune", "recipe.toml")
    seen = {mount["source"]: "readonly" in mount for mount in mounts(command)}
    assert seen == {f"{place}/{n}": n != "out" for n in ("bids", "out", "labels", "recipe.toml")}
    assert command[command.index("--fine-tune") + 1] == f"{place}/recipe.toml"
    command = printed(capsys, *words, "--fine-tune", "careful")
    assert command[command.index("--fine-tune") + 1] == "careful"
    assert "there is no such file or folder" in refused(
        capsys, 66, *words[:-1], "gone", "--fine-tune"
    )


def test_a_participant_called_like_a_level_is_no_level(place, capsys):
    command = printed(
        capsys, "--engine", "docker", "--participant-label", "participant", "01", "--dry-run",
        "bids", "out", "participant",
    )  # fmt: skip
    said = command[command.index("tlseg") + 1 :]
    assert said[:3] == [f"{place}/bids", f"{place}/out", "participant"]
    assert said[3:-1] == ["--participant-label", "participant", "01", "--dry-run"]


def test_weights_that_were_fetched_are_seen(place, capsys, monkeypatch):
    cache = place / "cache"
    cache.mkdir()
    monkeypatch.setenv("TLSEG_CACHE", str(cache))
    command = printed(capsys, "--engine", "docker", "bids", "out", "participant")
    assert {"type": "bind", "source": str(cache), "target": str(cache), "readonly": ""} in mounts(
        command
    )
    assert f"TLSEG_CACHE={cache}" in command
    command = printed(capsys, "--network", "--engine", "docker", "bids", "out", "participant")
    assert "--network" not in command
    assert "--offline" not in command
    assert {"type": "bind", "source": str(cache), "target": str(cache)} in mounts(command)


@pytest.mark.parametrize("engine", ["docker", "apptainer"])
def test_templates_of_this_machine_are_seen_if_a_space_is_asked_for(
    place, capsys, monkeypatch, engine
):
    home = place / "templates"
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    words = ("--engine", engine, "bids", "out", "participant")
    asked = (*words, "--output-spaces", "MNI152NLin2009cAsym")
    missing = printed(capsys, *asked)
    assert not [word for word in missing if "TEMPLATEFLOW_HOME" in word]
    home.mkdir()
    command = printed(capsys, *asked)
    assert f"TEMPLATEFLOW_HOME={home}" in command
    assert str(home) in [mount["source"] for mount in mounts(command)]
    assert not [word for word in printed(capsys, *words) if "TEMPLATEFLOW_HOME" in word]


def test_a_gpu_of_this_machine_is_passed(place, capsys, monkeypatch):
    (place / "nvidiactl").touch()
    monkeypatch.setattr(launch, "GPU_DEVICE", place / "nvidiactl")
    words = ("--engine", "docker", "bids", "out", "participant")
    assert "--gpus" in printed(capsys, *words)
    assert "--gpus" not in printed(capsys, *words, "--device", "cpu")
    assert "--gpus" not in printed(capsys, "--gpu", "no", *words)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("nowhere", "out", "participant"), 66, "no such file or folder – {place}/nowhere – check"),
        (("bids", "/usr/out", "participant"), 64, "would cover /usr of the image – /usr/out – use"),
        (("bids", "/", "participant"), 64, "would cover /"),
        (("bids", "/opt", "participant"), 64, "would cover /opt/tlseg of the image – /opt – use a"),
        (("bids", "/tmp", "participant"), 64, "would cover /tmp of the image – /tmp – use a"),
        (("bids", "o\nut", "participant"), 64, "a line break or a control character – "),
        (("bids", "out", "participants"), 17, "unknown level 'participants'"),
        (("bids", "out", "participant", "--x"), 64, "unrecognized arguments: --x"),
        (("bids", "out", "participant", "--models", "gone"), 66, "{place}/gone – check the path"),
        (
            ("bids", "out", "participant", "--executor", "dask", "--dask", "tcp://h:1"), 64,
            "cannot start the workers of a cluster – --executor – run tlseg itself",
        ),
        (
            ("--engine", "apptainer", "--image", "x.sif", "bids", "out", "participant"), 66,
            "there is no such image – {place}/x.sif – build it",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_is_a_sentence(place, capsys, words, code, message):
    assert message.format(place=place) in refused(capsys, code, *words)


@pytest.mark.usefixtures("place")
def test_a_missing_engine_is_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(launch.shutil, "which", lambda _: None)
    said = refused(capsys, 66, "bids", "out", "participant")
    assert "docker and podman and apptainer and singularity are not installed – PATH – inst" in said
    said = refused(capsys, 66, "--engine", "podman", "bids", "out", "participant")
    assert "podman is not installed – PATH – install an engine" in said


def test_too_little_memory_is_a_sentence(place, capsys, monkeypatch):
    meminfo = place / "meminfo"
    meminfo.write_text("MemTotal: 8000000 kB\nMemAvailable: 2097152 kB\n")
    monkeypatch.setattr(resources, "MEMORY", meminfo)
    monkeypatch.setattr(resources, "GROUP", place / "no-groups")
    words = ("bids", "out", "participant", "--nprocs", "8", "--omp-nthreads", "2")
    said = refused(capsys, 64, *words)
    assert "2.0 GiB of memory are free and 4 scans at once take about 8.0 GiB – --nprocs" in said
    assert "lower --nprocs" in said
    for more in (("--model", "adult-t1w"), ("--protocol", "braincolor")):
        assert "4 scans at once take about 14.0 GiB" in refused(capsys, 64, *words, *more)
    assert "at once take about 10.0 GiB" in refused(capsys, 64, *words, "--model", "my-site")


@pytest.mark.usefixtures("place")
def test_too_little_disk_is_a_sentence(capsys, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(launch.shutil, "disk_usage", lambda _: usage)
    said = refused(capsys, 73, "bids", "out", "participant", "--nprocs", "1")
    assert "0.0 GiB of disk are free and 1 scan takes about 0.0 GiB" in said
    assert "free some space, choose another OUT_DIR" in said


def test_the_engine_is_started_without_a_shell_and_its_code_returned(place, monkeypatch):
    engine = place / "engine"
    engine.write_text(
        f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('seen', 'w'))\n"
        "sys.exit(18)\n"
    )
    engine.chmod(0o755)
    monkeypatch.setitem(
        launch.COMMANDS, "docker", lambda _, what: [str(engine), *what.words, "; touch pwned"]
    )
    words = ["--engine", "docker", "--no-checks", "bids", "o u t", "participant"]
    assert launch.main(words) == 18
    assert (place / "o u t").is_dir(), "what is written to is made before the engine starts"
    assert '"; touch pwned"' in (place / "seen").read_text()
    assert not (place / "pwned").exists()


ENGINE = """#!/bin/sh
trap 'sleep 1; echo stopped >> heard; exit 130' INT TERM
echo started
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(("end", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_an_engine_has_the_time_to_stop_its_container(place, end, number):
    (place / "docker").write_text(ENGINE)
    (place / "docker").chmod(0o755)
    words = ["--engine", "docker", "--no-checks", "bids", "out", "participant"]
    code = f"import sys; from tlseg_bids.cli.launch import main; sys.exit(main({words}))"
    started = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": f"{place}:{os.environ['PATH']}"}, start_new_session=True,
    )  # fmt: skip
    assert started.stdout.readline() == "started\n"
    end(started.pid, number)
    said = started.communicate(timeout=30)
    assert (started.returncode, said) == (130, ("", ""))
    assert (place / "heard").read_text() == "stopped\n", "once, and to its end"


@pytest.mark.usefixtures("place")
def test_a_run_that_is_told_to_end_while_its_engine_starts_hands_it_on(monkeypatch):
    begin = subprocess.Popen

    def started(*given, **more):
        engine = begin(*given, **more)
        os.kill(os.getpid(), signal.SIGTERM)
        return engine

    monkeypatch.setattr(launch.subprocess, "Popen", started)
    monkeypatch.setitem(launch.COMMANDS, "docker", lambda *_: ["sleep", "60"])
    words = ["--engine", "docker", "--no-checks", "bids", "out", "participant"]
    assert launch.main(words) == 128 + signal.SIGTERM


def test_an_engine_that_is_killed_gives_the_code_of_a_shell(place, monkeypatch):
    monkeypatch.setitem(launch.COMMANDS, "docker", lambda *_: ["sh", "-c", "kill -9 $$"])
    words = ["--engine", "docker", "--no-checks", "bids", "out", "participant"]
    assert launch.main(words) == 137
    assert place.is_dir()


def test_an_engine_that_cannot_be_started_is_a_sentence(place, capsys, monkeypatch):
    monkeypatch.setitem(launch.COMMANDS, "docker", lambda *_: [str(place / "gone")])
    said = refused(capsys, 66, "--engine", "docker", "--no-checks", "bids", "out", "participant")
    assert f"docker cannot be started (No such file or directory) – {place}/gone – mend it" in said


@pytest.mark.usefixtures("place")
def test_an_output_that_cannot_be_made_is_a_sentence(capsys):
    said = refused(capsys, 73, "--engine", "docker", "--no-checks", "bids", "tlseg.sif/x",
                   "participant")  # fmt: skip
    assert "the folder cannot be made (Not a directory)" in said
    assert "choose another one" in said


def test_help_names_every_engine_and_imports_nothing_heavy():
    code = (
        "import sys; from tlseg_bids.cli.launch import main; main(['--help']); "
        "print(sorted({'torch', 'numpy', 'pandas', 'nibabel', 'bids'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert all(engine in done.stdout for engine in launch.ENGINES)
    assert done.stdout.splitlines()[-1] == "[]"

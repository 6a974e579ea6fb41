"""The files that `fuzz.py` spoils: what each is when sound, how it is mutated, what reads it."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fuzz_mutations import (  # noqa: E402
    Random,
    bundle_of,
    json_of,
    nifti_of,
    table_of,
    tensors_of,
    toml_of,
)
from fuzz_readers import (  # noqa: E402
    PERSON,
    dataset,
    derivatives,
    labelled,
    put,
    read_age,
    read_bundle,
    read_description,
    read_front,
    read_group,
    read_image,
    read_logs,
    read_lut,
    read_model_card,
    read_old_description,
    read_options,
    read_rated,
    read_report,
    read_sidecar,
    read_weights,
    toy_model,
)

from tests import toy  # noqa: E402
from tests.datasets import config, table  # noqa: E402
from tlseg_bids.bids.discover import discover  # noqa: E402
from tlseg_bids.cli.values import filters  # noqa: E402
from tlseg_bids.executors.cluster import read_queue_file  # noqa: E402
from tlseg_bids.group.parameters import FORMAT, read_parameters  # noqa: E402
from tlseg_bids.train.recipe import load_recipe  # noqa: E402
from tlseg_bids.zoo.bundle import export_model  # noqa: E402
from tlseg_bids.zoo.card_file import read_card  # noqa: E402


@dataclass(frozen=True)
class Target:
    """A file, how it is mutated, and what reads it.

    `share` is its part of all inputs; `seed` is the sound content, given the folder of the worker;
    `read` is given that folder and the mutated bytes.
    """

    name: str
    share: int
    mutate: Callable[[bytes, Random], bytes]
    seed: Callable[[Path], bytes]
    read: Callable[[Path, bytes], object]


def toy_scan(folder: Path) -> bytes:
    """The toy head, not packed."""
    return toy.write_scan(folder / "seed.nii").read_bytes()


def report_labels(folder: Path) -> bytes:
    """A label map, unpacked; nifti_of packs some."""
    return gzip.decompress((labelled(folder) / f"{PERSON}_dseg.nii.gz").read_bytes())


def text(content: str | dict[str, Any]) -> Callable[[Path], bytes]:
    """A seed that is known."""
    return lambda _: (content if isinstance(content, str) else json.dumps(content)).encode()


def of(name: str, root: Callable[[Path], Path] = dataset) -> Callable[[Path], bytes]:
    """A seed that lies in a folder."""
    return lambda folder: (root(folder) / name).read_bytes()


SESSION = "sub-01/ses-1/"
STATUS = table(
    "time|scan|status|model|seconds|peak_memory_gib|error|hint|files",
    "2025-01-01T00:00:00+00:00|sub-01/x|failed|any|1|1|bad|mend|", "t|sub-02/y|done|any|1|1|||a b",
)  # fmt: skip
CONFIG = """\
participant-label = ["01", "02"]
nprocs = 2
device = "cpu"
mem = "8G"
shard = "1/2"
verbose = 1
probabilities = true
age = "34"
bids-filter-file = {t1w = {session = "01"}}
"""
QUEUE = 'cluster = "slurm"\njobs = 3\n[options]\ncores = 2\nmemory = "8GB"\n'
PARAMETERS = {
    "Format": FORMAT, "FormatVersion": 1, "Volume": "hard",
    "Strata": {"T1w": {"Structures": ["a", "b"],
        "HeadSize": {"Method": "ratio", "Measure": "icv", "MeanHeadSize": 1.5e6,
                     "Slopes": [1.0, 2.0], "Scans": 3},
        "Combat": {"Column": "site", "Reference": None, "Terms": ["scale", "offset"],
                   "Covariates": [], "Sites": {"x": {"Scans": 3, "Numbers": [[1, 2], [3, 4]]}}}}},
}  # fmt: skip
RATINGS = table(
    "participant_id|scan|rating|rater|note|time|content_key",
    "sub-01|sub-01_space-T1w_seg-aseg|fail|me|why|2025|n/a",
)  # fmt: skip
LUT = table("index|name|color", "0|Background|#000000", "2|Left|#ffffff", "41|Right|#00ff00")


TARGETS = (
    Target("nifti", 6500, nifti_of, of(SESSION + "anat/sub-01_ses-1_T1w.nii"), read_image),
    Target("sidecar", 1500, json_of, of(SESSION + "anat/sub-01_ses-1_T1w.json"), read_sidecar),
    Target("participants", 1500, table_of, of("participants.tsv"), read_age("participants.tsv")),
    Target("participants-json", 500, json_of, of("participants.json"),
           read_age("participants.json")),
    Target("sessions", 1000, table_of, of("sub-01/sub-01_sessions.tsv"),
           read_age("sub-01/sub-01_sessions.tsv")),
    Target("scans", 1000, table_of, of(SESSION + "sub-01_ses-1_scans.tsv"),
           read_age(SESSION + "sub-01_ses-1_scans.tsv")),
    Target("description", 600, json_of, of("dataset_description.json"), read_description),
    Target("old-description", 400, json_of, of("dataset_description.json", derivatives),
           read_old_description),
    Target("filters", 500, json_of, text({"t1w": {"session": "1", "run": [1, None]}}),
           lambda folder, content: filters(str(put(folder / "f.json", content)))),
    Target("discovery", 150, json_of, text({"t1w": {"session": "1", "run": [1, None]}}),
           lambda folder, content: discover(replace(
               config(dataset(folder)), filters=filters(str(put(folder / "f.json", content)))))),
    Target("config", 1200, toml_of, text(CONFIG), read_options),
    Target("card", 1200, toml_of, lambda folder: toy_model(folder).read_bytes(), read_model_card),
    Target("weights", 700, tensors_of,
           lambda folder: toy_model(folder).with_suffix(".safetensors").read_bytes(), read_weights),
    Target("bundle", 500, bundle_of,
           lambda folder: export_model(read_card(toy_model(folder)), folder).read_bytes(),
           read_bundle),
    Target("labels-table", 800, table_of, text(LUT), read_lut),
    Target("queue", 300, toml_of, text(QUEUE),
           lambda folder, content: read_queue_file(put(folder / "q.toml", content))),
    Target("recipe", 500, toml_of,
           lambda _: (ROOT / "tlseg_bids" / "train" / "recipes" / "infant.toml").read_bytes(),
           lambda folder, content: load_recipe(put(folder / "r.toml", content))),
    Target("parameters", 500, json_of, text(PARAMETERS),
           lambda folder, content: read_parameters(put(folder / "p.json", content))),
    Target("status", 300, table_of, text(STATUS), read_logs("status_20250101T000000Z-a.tsv")),
    Target("plan", 200, table_of, text("scan\tstatus\tkey\nsub-01/x\tplanned\tk\n"),
           read_logs("plan_20250101T000000Z-a.tsv")),
    Target("plan-json", 200, json_of,
           text({"Skipped": [{"Scan": "sub-01/x", "Reason": "bad", "Hint": "mend"}]}),
           read_logs("plan_20250101T000000Z-a.json")),
    Target("group-sidecar", 250, json_of, of(f"{PERSON}_dseg.json", derivatives),
           read_group(f"{PERSON}_dseg.json")),
    Target("group-volumes", 250, table_of, of(f"{PERSON}_desc-volumes_dseg.tsv", derivatives),
           read_group(f"{PERSON}_desc-volumes_dseg.tsv")),
    Target("group-participants", 250, table_of, of("../raw/participants.tsv", derivatives),
           read_group("../raw/participants.tsv")),
    Target("group-ratings", 200, table_of, text(RATINGS), read_rated),
    Target("report-sidecar", 100, json_of, of(f"{PERSON}_dseg.json", labelled),
           read_report(f"{PERSON}_dseg.json")),
    Target("report-volumes", 60, table_of, of(f"{PERSON}_desc-volumes_dseg.tsv", labelled),
           read_report(f"{PERSON}_desc-volumes_dseg.tsv")),
    Target("report-protocol", 60, table_of, of("seg-own_dseg.tsv", labelled),
           read_report("seg-own_dseg.tsv")),
    Target("report-labels", 60, nifti_of, report_labels, read_report(f"{PERSON}_dseg.nii.gz")),
    Target("whole-nifti", 160, nifti_of, toy_scan, read_front("sub-01/anat/sub-01_T1w.nii")),
    Target("whole-sidecar", 50, json_of, text({"SkullStripped": True}),
           read_front("sub-01/anat/sub-01_T1w.json")),
    Target("whole-participants", 50, table_of, text("participant_id\tage\nsub-01\t34\n"),
           read_front("participants.tsv")),
    Target("whole-description", 50, json_of, text({"Name": "x", "BIDSVersion": "1.10.0"}),
           read_front("dataset_description.json")),
)  # fmt: skip

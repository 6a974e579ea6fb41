"""The data dictionary: what every column of every table means, and in which unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tlseg_bids.group.analyse import Stratum
from tlseg_bids.group.headsize import FORMULAS, UNITS
from tlseg_bids.group.outliers import Z_LIMIT
from tlseg_bids.group.study import Key, Study

MM3 = "mm^3"
TOTAL_NAMES = {"brain": "brain without the fluid around it", "icv": "intracranial space"}


def entry(text: str, units: str | None = None, levels: dict[str, str] | None = None) -> dict:
    """A column in the form of BIDS' own sidecars."""
    return {
        "Description": text,
        **({"Units": units} if units else {}),
        **({"Levels": levels} if levels else {}),
    }


IDENTITY = {
    "participant_id": entry("Participant, as in participants.tsv"),
    "session_id": entry("Session; n/a in a dataset without sessions"),
    "scan": entry("Label map without _dseg.nii.gz, by which the tables of scans can be joined"),
    "protocol": entry("Label protocol; structures of different protocols are not comparable"),
    "suffix": entry("Suffix of the scan that was labelled", levels={
        "T1w": "T1-weighted", "T2w": "T2-weighted"}),
}  # fmt: skip
MODEL = {
    "model": entry("Model that labelled the scans; those of different models are not put together"),
    "model_version": entry("Its version; different versions count as different models"),
}
STRUCTURE = {
    "index": entry("Label of the structure in the label map"),
    "structure": entry("Structure, as in the column names of group_volumes.tsv"),
    "hemisphere": entry("Side", levels={"left": "left", "right": "right", "none": "no side"}),
}
MEASURED = {
    "hard_mm3": entry("Volume of the voxels that carry the label", MM3),
    "soft_mm3": entry("Sum of the label's probability times the voxel volume", MM3),
    "voxels": entry("Voxels that carry the label"),
    "mean_confidence": entry(
        "Mean probability of the label over its own voxels, 0 to 1; n/a where it has none"
    ),
    "predicted_dice": entry("Dice overlap that the model expects, 0 to 1"),
    "cut_share": entry("Share of the structure expected beyond the scan's outer faces, 0 to 1"),
}
ROBUST_Z = entry(
    "Distance from the median in robust standard deviations (1.4826 times the median absolute "
    "deviation), of the most processed volume in this table; among the scans nearest in age where "
    "age is known, else among all of the same protocol and suffix, whichever model labelled them",
    "1",
)  # fmt: skip
OWN = {
    **IDENTITY,
    "acquisition": entry("Entity acq of the scan"),
    "contrast_agent": entry("Entity ce of the scan"),
    "reconstruction": entry("Entity rec of the scan"),
    "run": entry("Entity run of the scan"),
    "echo": entry("Entity echo of the scan"),
    "part": entry("Entity part of the scan"),
    "chunk": entry("Entity chunk of the scan"),
    "age_years": entry(
        "Age at the scan: the nearest of scans, sessions and participants table that gives one, "
        "else what was known when the scan was labelled", "year",
    ),
    "postmenstrual_weeks": entry("Post-menstrual age at the scan, from the same table", "week"),
    "age_source": entry("Where the age is from, or why there is none"),
    "model": entry("Model that labelled the scan"),
    "model_version": entry("Its version"),
    "content_key": entry("Hash of everything that the labels depend on"),
    "verdict": entry("What the subject's report says at a glance", levels={
        "use": "no finding", "look": "a look is advised", "exclude": "unfit for use"}),
    "reasons": entry("Why"),
}  # fmt: skip
OUTLIERS = {
    **IDENTITY,
    "structure": STRUCTURE["structure"],
    "value": entry("The volume that was judged: harmonised and corrected where that was asked"),
    "median": entry("Median of those it was compared with, in the unit of value"),
    "robust_sd": entry("Their robust standard deviation, in the unit of value"),
    "robust_z": entry(f"(value - median) / robust_sd; rows are those beyond {Z_LIMIT}", "1"),
    "basis": entry("Whom it was compared with", levels={
        "age": "the scans nearest in age", "all": "all scans of the same protocol and suffix"}),
}  # fmt: skip
CHANGE = {
    "participant_id": IDENTITY["participant_id"],
    "scan": entry("Label map of the first scan"),
    "protocol": IDENTITY["protocol"],
    "suffix": IDENTITY["suffix"],
    **MODEL,
    "structure": STRUCTURE["structure"],
    "visits": entry("Visits; scans within 30 days are one visit and are averaged"),
    "span_years": entry("Time from the first to the last visit", "year"),
    "time_from": entry("Where the time is from", levels={
        "acq_time": "acq_time of the scans or sessions table",
        "age": "the age that the scans or sessions table gives for each visit: since birth, or "
        "post-menstrual where that is known for all visits and the other is not"}),
    "first_mm3": entry("Volume at the first visit (after ComBat where that was asked)", MM3),
    "last_mm3": entry("Volume at the last visit", MM3),
    "rate_mm3_per_year": entry("Least-squares slope over the visits", "mm^3/year"),
    "percent_per_year": entry(
        "Slope in percent of the mean over the visits (symmetrised percent change, "
        "https://doi.org/10.1016/j.neuroimage.2012.02.084)", "percent/year",
    ),
}  # fmt: skip
_ICC = "intraclass correlation of single scans (https://doi.org/10.1037/0033-2909.86.2.420)"
RELIABILITY = {
    "protocol": IDENTITY["protocol"],
    "suffix": IDENTITY["suffix"],
    **MODEL,
    "structure": STRUCTURE["structure"],
    "participants": entry(
        "Participants with two scans within 30 days or in one session, and this volume in both"
    ),
    "icc_2_1": entry(f"ICC(2,1), absolute agreement: {_ICC}", "1"),
    "icc_2_1_low": entry("Lower end of its 95 % confidence interval", "1"),
    "icc_2_1_high": entry("Upper end", "1"),
    "icc_3_1": entry(f"ICC(3,1), consistency: {_ICC}", "1"),
    "icc_3_1_low": entry("Lower end of its 95 % confidence interval", "1"),
    "icc_3_1_high": entry("Upper end", "1"),
    "within_subject_cv_percent": entry(
        "Within-subject coefficient of variation, root mean square over participants "
        "(https://doi.org/10.2307/2532835)",
        "percent",
    ),
    "absolute_difference_percent": entry(
        "Mean over participants of the absolute difference in percent of the mean", "percent"
    ),
}
SITE_EFFECT = {
    "protocol": IDENTITY["protocol"],
    "suffix": IDENTITY["suffix"],
    "structure": STRUCTURE["structure"],
    "site_share_before": entry(
        "Share of the variance of the measured volume that the site explains beyond the covariates "
        "of ComBat (partial eta squared), over all scans that ComBat applies to", "1",
    ),
    "site_share_after": entry("The same after ComBat", "1"),
}  # fmt: skip
EXCLUSION = {
    **IDENTITY,
    "proposal": entry("What is proposed; no table leaves a scan out because of it", levels={
        "use": "nothing speaks against it, or a rater passed it",
        "look": "look at the report before using it",
        "exclude": "a rater failed it, or nobody rated it and its verdict is exclude; with "
        "--multi-run first or best-qc also: another run of the scan is to be used"}),
    "reasons": entry("Why, most important first"),
    "ratings": entry("Ratings of the present result"),
    "outliers": entry(f"Volumes whose robust_z is beyond {Z_LIMIT}"),
    "largest_z": entry("Largest absolute robust_z of the scan's volumes", "1"),
}  # fmt: skip


def fact(study: Study, key: Key) -> dict[str, Any]:
    """Description of a column that is no volume."""
    source, column = key
    if not source:
        return OWN[column]
    if source == "scanner":
        return entry("Scanner, from the scan's JSON")
    if source == "qc":
        return entry("Quality score of the labels, from their JSON (QualityControl)")
    told = study.descriptions.get(key, {})
    return {"Description": f"Column '{column}' of {source}.tsv", **told}


def volume(kind: str, feature: str, measure: str, strata: Sequence[Stratum]) -> dict[str, Any]:
    """Description of a volume column of the wide table."""
    name = feature.replace("_", " ")
    if feature in ("brain", "icv"):
        name, measure = TOTAL_NAMES[feature], "hard"
    if kind == "raw":
        return entry(f"Volume of {name} ({measure}), as measured", MM3)
    if kind == "asymmetry":
        return entry(
            f"Asymmetry of {name}: 200 (left - right) / (left + right) of the measured volumes",
            "percent",
        )
    return extra("combat_mm3" if kind == "combat" else kind, measure, strata, f"{name}: ")


def extra(kind: str, measure: str, strata: Sequence[Stratum], name: str = "") -> dict[str, Any]:
    """Description of a harmonised or corrected volume."""
    combat = next((s.fit.combat for s in strata if s.fit.combat), None)
    head = next((s.fit.head for s in strata if s.fit.head), None)
    if kind == "combat_mm3" and combat:
        kept = [c.column for c in combat.covariates]
        reference = f", reference {combat.reference}" if combat.reference else ""
        return entry(
            f"{name}{measure} volume after ComBat by '{combat.column}'{reference}, keeping the "
            f"effect of {', '.join(kept) or 'no covariate'}", MM3,
        )  # fmt: skip
    assert head is not None
    after = " after ComBat" if combat else ""
    size = {"icv": "intracranial volume", "brain": "brain volume"}[head.measure]
    return entry(
        f"{name}{measure} volume{after}, corrected for head size ({size}) by '{head.method}': "
        f"{FORMULAS[head.method]}", UNITS[head.method],
    )  # fmt: skip

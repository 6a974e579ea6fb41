"""Standard spaces that labels are wanted in: TemplateFlow's grammar and its templates.

TemplateFlow: Ciric et al. 2022, doi:10.1038/s41592-022-01681-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tlseg_bids.errors import NoInputError, UsageError

OPTION = "--output-spaces"


@dataclass(frozen=True)
class Space:
    """A template: its name, and cohort and resolution where they were asked for.

    `file` is the T1w of the template, whose grid the labels get; None before it was looked for.
    """

    name: str
    cohort: str | None = None
    res: str | None = None
    file: Path | None = None

    @property
    def entities(self) -> dict[str, str]:
        """``space`` as the NiPreps write it (``MNIInfant+2`` for a cohort), and ``res``."""
        space = self.name if self.cohort is None else f"{self.name}+{self.cohort}"
        return {"space": space} if self.res is None else {"space": space, "res": self.res}

    def __str__(self) -> str:
        parts = {"cohort": self.cohort, "res": self.res}
        return ":".join([self.name, *(f"{k}-{v}" for k, v in parts.items() if v is not None)])


def parse_space(text: str) -> list[Space]:
    """What ``MNI152NLin2009cAsym:res-2`` or ``MNIInfant:cohort-1:cohort-2`` asks for.

    Raises
    ------
    UsageError
        If it is no space that TemplateFlow has, or one that is no volume.
    """
    from niworkflows.utils.spaces import Reference

    try:
        found = Reference.from_string(text)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split()), f"{OPTION} {text}", "correct it") from error
    spaces = []
    for one in found:
        if not one.standard or one.dim != 3:
            raise UsageError(
                f"'{one.space}' is no volumetric template; labels on the scan's own grid are "
                "always written",
                f"{OPTION} {text}", "leave it out",
            )  # fmt: skip
        spec = {"res" if key == "resolution" else key: value for key, value in one.spec.items()}
        unknown = sorted(set(spec) - {"cohort", "res"})
        if unknown:
            raise UsageError(
                f"labels know no '{unknown[0]}'", f"{OPTION} {text}", "give cohort and res alone"
            )
        res = spec.get("res")
        number = str(int(res)) if res is not None and str(res).isdecimal() else res
        spaces.append(Space(one.space, spec.get("cohort"), number))
    return spaces


def find_template_file(space: Space, offline: bool, fetch: bool = True) -> Path:
    """The template's T1w, fetched by TemplateFlow unless `offline`; the finest if none was named.

    Without `fetch`, one that could be fetched is only named.

    Raises
    ------
    NoInputError
        If it is not on this machine and cannot be fetched, or there is no such file.
    """
    from templateflow import api, conf

    query: dict[str, object] = {"suffix": "T1w", "desc": None, "extension": [".nii.gz", ".nii"]}
    if space.cohort is not None:
        query["cohort"] = space.cohort
    if space.res is not None:
        query["resolution"] = int(space.res) if space.res.isdecimal() else space.res
    listed = sorted(Path(path) for path in api.ls(space.name, **query))
    if not listed:
        raise NoInputError(
            f"TemplateFlow has no T1w for '{space}'", f"{OPTION} {space}",
            "ask for another resolution or cohort",
        )  # fmt: skip
    path = listed[0]  # res-01 comes first
    if (path.is_file() and path.stat().st_size) or not (fetch or offline):
        return path
    problem = "--offline forbids to fetch it"
    if not offline:
        try:
            api.get(space.name, **query)
        except (OSError, RuntimeError) as error:  # errors of requests are OSErrors
            problem = f"it cannot be fetched ({type(error).__name__})"
        else:
            return path
    raise NoInputError(
        f"the template '{space}' is not on this machine and {problem}", path,
        f"run `templateflow get {space.name}` where there is a network, copy {conf.TF_HOME} here "
        "and set TEMPLATEFLOW_HOME to it",
    )  # fmt: skip

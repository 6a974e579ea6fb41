"""JSON metadata of one scan under the BIDS inheritance principle.

pybids can merge sidecars too, but only after it has read every JSON of the dataset into its
metadata index; here only the few files above one scan are opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tlseg_bids.bids.tables import read_json

NO_AGENT = {"", "none", "no", "n/a", "na", "null", "false", "pre", "noce", "without"}


class SidecarReader:
    """Merges the sidecars of one scan after another; every file is read once.

    Parameters
    ----------
    bids_dir : Path
        Root of the dataset; no file above it is read.
    """

    def __init__(self, bids_dir: Path) -> None:
        self._root = bids_dir
        self._folders: dict[Path, list[Path]] = {}
        self._files: dict[Path, tuple[dict[str, Any], str]] = {}

    def metadata(self, path: Path, entities: dict[str, str], suffix: str):
        """Metadata of the scan `path`, the nearest file winning.

        A JSON file applies if it lies in a folder above the scan, has its suffix, and names no
        entity that the scan does not have (https://doi.org/10.1038/sdata.2016.44). Two that apply
        in one folder are merged, the one with more entities last.

        Returns
        -------
        metadata : dict
            The merged content.
        problem : str
            Which sidecar cannot be read and why; empty if all can.
        """
        merged: dict[str, Any] = {}
        folders = [folder for folder in path.parents if folder.is_relative_to(self._root)]
        for folder in reversed(folders):
            for sidecar in self._applying(folder, entities, suffix):
                if sidecar not in self._files:
                    self._files[sidecar] = read_json(sidecar)
                content, problem = self._files[sidecar]
                if problem:
                    return {}, f"its sidecar {sidecar.relative_to(self._root)} {problem}"
                merged.update(content)
        return merged, ""

    def _applying(self, folder: Path, entities: dict[str, str], suffix: str) -> list[Path]:
        """JSON files in `folder` that apply to the scan, fewest entities first."""
        if folder not in self._folders:
            self._folders[folder] = sorted(folder.glob("*.json"))
        found = []
        for file in self._folders[folder]:
            *pairs, last = file.name.removesuffix(".json").split("_")
            named = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
            if last == suffix and len(named) == len(pairs) and named.items() <= entities.items():
                found.append((len(named), file))
        return [file for _, file in sorted(found)]


def contrast_agent(metadata: dict[str, Any], entities: dict[str, str]) -> str | None:
    """The contrast agent a scan was made with, in lower case; None if there was none.

    ``ContrastBolusIngredient`` comes before the entity ``ce-``; a value that says there was no
    agent (``NONE``, ``n/a``, an empty string, ``ce-pre``) counts as absent.
    """
    for value in (metadata.get("ContrastBolusIngredient"), entities.get("ce")):
        text = str(value).strip().lower() if value is not None else ""
        if text not in NO_AGENT:
            return text
    return None


def skull_stripped(metadata: dict[str, Any]) -> bool | None:
    """``SkullStripped`` of a sidecar; None if it is absent or not a truth value."""
    value = metadata.get("SkullStripped")
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None

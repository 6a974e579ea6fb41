"""Whose a derivative is: some names are those of another protocol's or another scan's file too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlseg_bids.bids.atomic import write_json, writing_failed
from tlseg_bids.bids.metadata import KEY, JobLike, sidecar_of
from tlseg_bids.bids.tables import read_json

PROTOCOL = "LabelProtocol"


@dataclass(frozen=True)
class Owner:
    """A scan labelled in a protocol.

    Parameters
    ----------
    uri : str
        BIDS URI of the scan.
    protocol : str
        Name of the label protocol.
    key : str
        Content key of the result.
    beside : tuple of str
        BIDS URIs of the scans that the model saw together with it.
    """

    uri: str
    protocol: str
    key: str
    beside: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: JobLike) -> Owner:
        """The owner of what is written for a job."""
        beside = tuple(other.uri for other in job.companions)
        return cls(job.scan.uri, job.card.protocol, job.key, beside)

    @property
    def sources(self) -> list[str]:
        """What the result was made of, the scan itself first."""
        return [self.uri, *self.beside]

    def write(
        self, about: Mapping[str, Any], write: Callable[..., Path], image: Path, *content: Any
    ) -> None:
        """Write an image and its JSON.

        The JSON names the owner before the image is there, and gets the content key after it:
        wherever a run is killed, no image stands beside the key of another one.

        Parameters
        ----------
        about : mapping
            What the JSON says, without the owner.
        write : callable
            `write_labels`, `write_fractions` or `write_xfm`, called with `image` and `content`.
        """
        about = {**about, "Sources": self.sources, PROTOCOL: self.protocol}
        write_json(sidecar_of(image), about)
        write(image, *content)
        write_json(sidecar_of(image), {**about, KEY: self.key})

    def finished(self, sidecar: Path) -> bool:
        """Whether the image of a JSON was written for this very result, to its end."""
        return read_json(sidecar)[0].get(KEY) == self.key

    def remove_others(self, folder: Path, keep: Collection[Path]) -> None:
        """Remove every image, with its JSON, of this scan and protocol that is not in `keep`.

        Raises
        ------
        CannotCreateError, OutputError
            If one cannot be removed.
        """
        for sidecar in sorted(set(folder.glob("*.json")) - set(keep)):
            content, _ = read_json(sidecar)
            sources = content.get("Sources")
            own = isinstance(sources, list) and sources[:1] == [self.uri]
            if own and content.get(PROTOCOL) == self.protocol:
                for extension in (".nii.gz", ".txt"):
                    remove_file(sidecar.with_name(sidecar.name.removesuffix(".json") + extension))
                remove_file(sidecar)


def remove_file(path: Path) -> None:
    """Remove a file if it is there.

    Raises
    ------
    CannotCreateError, OutputError
        If it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise writing_failed(error, path) from error

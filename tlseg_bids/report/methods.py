"""The methods section a paper can take over: what was done, by which model, and whom to cite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlseg_bids.zoo.card import Domain, ModelCard, Weights

BIDS, BIDS_APPS = "10.1038/sdata.2016.44", "10.1371/journal.pcbi.1005209"
PYBIDS, NIBABEL = "10.21105/joss.01294", "10.5281/zenodo.591597"
PYTORCH, ASEG = "10.48550/arXiv.1912.01703", "10.1016/S0896-6273(02)00569-X"

REFERENCES = {
    BIDS: "Gorgolewski KJ, Auer T, Calhoun VD, et al. The brain imaging data structure, a format "
    "for organizing and describing outputs of neuroimaging experiments. Scientific Data "
    "2016;3:160044.",
    BIDS_APPS: "Gorgolewski KJ, Alfaro-Almagro F, Auer T, et al. BIDS apps: improving ease of use, "
    "accessibility, and reproducibility of neuroimaging data analysis methods. PLoS "
    "Computational Biology 2017;13(3):e1005209.",
    PYBIDS: "Yarkoni T, Markiewicz CJ, de la Vega A, et al. PyBIDS: Python tools for BIDS "
    "datasets. Journal of Open Source Software 2019;4(40):1294.",
    NIBABEL: "Brett M, Markiewicz CJ, Hanke M, et al. nibabel (software). Zenodo.",
    PYTORCH: "Paszke A, Gross S, Massa F, et al. PyTorch: an imperative style, high-performance "
    "deep learning library. Advances in Neural Information Processing Systems 2019;32.",
    ASEG: "Fischl B, Salat DH, Busa E, et al. Whole brain segmentation: automated labeling of "
    "neuroanatomical structures in the human brain. Neuron 2002;33(3):341–355.",
    "10.1016/j.media.2023.102789": "Billot B, Greve DN, Puonti O, et al. SynthSeg: segmentation "
    "of brain MRI scans of any contrast and resolution without retraining. Medical Image Analysis "
    "2023;86:102789.",
    "10.1007/978-3-319-24574-4_28": "Ronneberger O, Fischer P, Brox T. U-Net: convolutional "
    "networks for biomedical image segmentation. MICCAI 2015, LNCS 9351:234–241.",
    "10.1007/978-3-319-46723-8_49": "Çiçek Ö, Abdulkadir A, Lienkamp SS, Brox T, Ronneberger O. "
    "3D U-Net: learning dense volumetric segmentation from sparse annotation. MICCAI 2016, "
    "LNCS 9901:424–432.",
    "10.1038/s41592-020-01008-z": "Isensee F, Jaeger PF, Kohl SAA, Petersen J, Maier-Hein KH. "
    "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation. "
    "Nature Methods 2021;18:203–211.",
}
PROTOCOL_SOURCES = {"aseg": ASEG}
WALKS = {"sliding": "in overlapping windows whose probabilities were blended", "whole": "at once"}
HALVES = "to each half of the brain, one of them in the mirror, and the two were blended"


@dataclass(frozen=True)
class Methods:
    """A methods section.

    Parameters
    ----------
    paragraphs : tuple of str
        Plain text; ``[n]`` cites reference n, counted from 1.
    references : tuple of (str, str)
        Description (empty if unknown) and link of each.
    """

    paragraphs: tuple[str, ...]
    references: tuple[tuple[str, str], ...]


class _Citations:
    """Numbers references in the order of their first mention."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def __call__(self, sources: Iterable[str]) -> str:
        numbers = []
        for source in dict.fromkeys(_bare(s) for s in sources):
            if source not in self.known:
                self.known.append(source)
            numbers.append(self.known.index(source) + 1)
        return f" [{', '.join(map(str, numbers))}]" if numbers else ""

    def listed(self) -> tuple[tuple[str, str], ...]:
        return tuple((REFERENCES.get(source, ""), _link(source)) for source in self.known)


def _bare(source: str) -> str:
    """A DOI without its resolver in front; anything else as it is."""
    for prefix in ("https://doi.org/", "http://doi.org/", "https://dx.doi.org/", "doi:"):
        source = source.removeprefix(prefix)
    return source.strip()


def _link(source: str) -> str:
    return f"https://doi.org/{source}" if source.startswith("10.") else source


def methods(cards: Sequence[ModelCard], version: str) -> Methods:
    """The methods section for scans labelled with `cards` by this program.

    Parameters
    ----------
    cards : sequence of ModelCard
        Every model that was used, once each.
    version : str
        Version of the program that labelled the scans.
    """
    cite = _Citations()
    paragraphs = [
        f"Brain structures were labelled with tlseg {version}, a BIDS App{cite([BIDS, BIDS_APPS])} "
        f"written in Python with PyBIDS{cite([PYBIDS])}, NiBabel{cite([NIBABEL])} and "
        f"PyTorch{cite([PYTORCH])}. For every T1-weighted and T2-weighted scan the program chose "
        "among its models by the scan's contrast, the participant's age and the use of a contrast "
        "agent; the choice, its reason and the models that were passed over are recorded beside "
        "each result.",
        *(_model_paragraph(card, cite) for card in cards),
        "The class probabilities were resampled once to the grid of the scan, where each voxel "
        "was given its most probable label; of every structure the largest connected component "
        "was kept and holes were filled. The volume of a structure is given twice: as the number "
        "of its voxels times the voxel volume (hard), and as the sum of its probabilities times "
        "the voxel volume (soft), both in mm³.",
    ]
    return Methods(tuple(paragraphs), cite.listed())


def methods_text(cards: Sequence[ModelCard], version: str) -> str:
    """The same as Markdown, for `logs/CITATION.md`.

    Parameters
    ----------
    cards : sequence of ModelCard
        Every model that was used, once each.
    version : str
        Version of the program that labelled the scans.
    """
    section = methods(cards, version)
    lines = ["# Methods", ""]
    for paragraph in section.paragraphs:
        lines += [paragraph, ""]
    lines += ["## References", ""]
    for number, (text, link) in enumerate(section.references, 1):
        lines.append(f"{number}. {f'{text} ' if text else ''}<{link}>")
    return "\n".join(lines) + "\n"


def card_told(model: Mapping[str, str], protocol: str, **more: Any) -> ModelCard:
    """What is told of a model whose card is not at hand.

    Parameters
    ----------
    model : mapping
        ``name``, ``version``, ``status``, ``sha256`` and ``licence``, empty where not told.
    protocol : str
        Label protocol of its output, empty where not told.
    more
        Further fields of the card.
    """
    return ModelCard(
        name=model["name"],
        version=model["version"] or "not given",
        status=model["status"],
        domain=Domain(),
        protocol=protocol,
        networks={},
        strategy={},
        preprocess={},
        weights=Weights(model["sha256"] or "not given", 0, model["licence"] or "not given"),
        **{"summary": "", **more},
    )


def _model_paragraph(card: ModelCard, cite: _Citations) -> str:
    """What one model is and how it walks a scan, told from its card alone."""
    kind = f"{card.status} " if card.status else ""
    protocol = f"gives the labels of the protocol '{card.protocol}'"
    sentences = [
        f"The {kind}model '{card.name}' (version {card.version}, weights sha256 "
        f"{card.weights.sha256[:16]}…, licence {card.weights.licence}) "
        f"{protocol if card.protocol else 'gave labels in an earlier run'}"
        f"{cite(s for s in [PROTOCOL_SOURCES.get(card.protocol)] if s)}."
    ]
    if card.summary:
        sentences.append(_sentence(card.summary))
    if card.parent:
        sentences.append(f"It was adapted from the model '{card.parent}'.")
    if "locator" in card.networks:
        sentences.append(
            "A first network found the structures' centroids at coarse resolution; from these, an "
            "affine alignment to a template was computed, and the scan was resampled once to the "
            "template-aligned grid of the segmentation network."
        )
    if "settler" in card.networks:
        sentences.append(
            "Before that, a small network labelled the aligned scan coarsely, and the alignment "
            "was corrected by the centroids of its labels until it came to rest."
        )
    if card.placed_by:
        sentences.append(
            f"The model '{card.placed_by}' found the brain: its affine alignment to a template was "
            "taken, and the scan was resampled once to the template-aligned grid."
        )
    walk = WALKS.get(str(card.strategy.get("name", "")))
    walk = HALVES if card.strategy.get("halves", False) else walk
    if walk:
        sentences.append(f"The segmentation network was applied {walk}.")
    sentences += [_evidence(entry) for entry in card.evidence]
    if card.citations:
        sentences.append(f"It builds on published work{cite(card.citations)}.")
    return " ".join(sentences)


def _evidence(entry: dict[str, Any]) -> str:
    spread = f" ± {entry['sd']}" if entry.get("sd") is not None else ""
    count = f" (n = {entry['n']})" if entry.get("n") is not None else ""
    how = f", {entry['how']}" if entry.get("how") else ""
    return _sentence(
        f"On {entry.get('dataset', 'a held-out dataset')}{count} its {entry.get('metric', 'score')}"
        f" was {entry.get('mean', 'not given')}{spread}{how}"
    )


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."

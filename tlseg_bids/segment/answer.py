"""What a segmenter answers: windows asked, blended and, where it pays, refined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.flow import Prediction, Prepared, SharedRows
from tlseg_bids.networks.convolution import join
from tlseg_bids.segment import HOW_ASKED, STRATEGIES
from tlseg_bids.segment.fine import Around, Side, both_sides, likely, refine, shares
from tlseg_bids.segment.model import Model, Seen, fast, logits_of
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import SEGMENTER

_PLANES = 16


@dataclass(frozen=True)
class Ask:
    """What a segmenter is asked for.

    `head` is a number in the model's heads; `fine` wants the finest answer that it has instead of
    the one at the stem's resolution; `mirror` shows it every window in the mirror, too, and takes
    the mean.
    """

    head: int = 0
    fine: bool = True
    mirror: bool = False


def _at(model: Model, shape: Sequence[int]) -> Tensor:
    """The atlases side by side at the coarse voxels of the card's box, (1, channels, i, j, k)."""
    with torch.inference_mode():
        return torch.cat([
            F.interpolate(prior, tuple(shape), mode="trilinear", align_corners=False)
            for prior in model.priors.values()
        ], 1)  # fmt: skip


def _atlas(model: Model, shape: list[int]) -> Tensor | None:
    """`_at` for an image of some shape, float16, found once for each."""
    if not model.priors:
        return None
    size = tuple(n // model.networks[SEGMENTER].stem for n in shape)
    if size not in model.atlas:
        model.atlas[size] = _at(model, size).half()
    return model.atlas[size]


def _seen(model: Model, shape: list[int]) -> Seen | None:
    """Found once for every size (i, j, k) of the box; None without an atlas."""
    if not model.priors:
        return None
    if (size := tuple(shape)) not in model.seen:
        network, prior = model.networks[SEGMENTER], _at(model, shape)
        turned = _mirror(model, prior)
        with torch.inference_mode():
            features = [network.prior_features(one) for one in (prior, turned)]
            features = [f.contiguous(memory_format=torch.channels_last_3d) for f in features]
            logits = [network.prior_logits(prior, head) for head in range(len(model.heads))]
        rows = [None if one is None else one[0].permute(1, 2, 3, 0).half() for one in logits]
        rows = [None if one is None else one.contiguous() for one in rows]
        model.seen[size] = Seen(tuple(features), tuple(rows))
    return model.seen[size]


def _part(atlas: Tensor | None, corner: Sequence[int], window: Tensor, stem: int) -> Tensor | None:
    """What lies at the coarse voxels of a window of (1, channels, i, j, k)."""
    if atlas is None:
        return None
    ends = zip(corner, window.shape[2:], strict=True)
    some = [slice(c // stem, (c + n) // stem) for c, n in ends]
    return atlas[(slice(None), slice(None), *some)]


def _answer(
    model: Model, ask: Ask, image: Tensor, prior: Tensor | None, member: int | None = None
) -> Tensor:
    """Probabilities of a window, float16 (1, channels, i, j, k), on the CPU.

    The card's temperature holds for the fine answer alone; the coarse one finds the frame.
    """
    parts = None if ask.fine else ()
    heat = _heat(model, ask.head) if ask.fine else 1.0
    who = {} if member is None else {"member": member}
    logits = logits_of(model, SEGMENTER, image, prior, head=ask.head, parts=parts, **who)
    out = torch.empty(logits.shape, dtype=torch.float16)
    for start in range(0, logits.shape[2], _PLANES):
        some = (slice(None), slice(None), slice(start, start + _PLANES))
        out[some] = F.softmax(logits[some].float() / heat, 1)
    return out


def _heat(model: Model, head: int) -> float:
    """The temperature of a head's answer."""
    return model.card.calibration.of_head(model.heads[head].name)


def _mirror(model: Model, prior: Tensor | None) -> Tensor | None:
    """The atlases of a window turned over along the first axis."""
    if prior is None:
        return None
    every = [p for p in model.heads if p.name in model.priors]
    starts = np.cumsum([0, *(len(p) for p in every)])
    swap = np.concatenate([p.mirror + n for p, n in zip(every, starts[:-1], strict=True)])
    return prior.flip(2)[:, torch.as_tensor(swap, device=prior.device)]


def _mirrored(
    model: Model, ask: Ask, image: Tensor, prior: Tensor | None, member: int | None = None
) -> Tensor:
    """Probabilities found in the mirror, brought back."""
    found = _answer(model, ask, image.flip(2), _mirror(model, prior), member)
    return found.flip(2)[:, torch.as_tensor(model.heads[ask.head].mirror)]


def segment(model: Model, prepared: Prepared, ask: Ask) -> Prediction:
    """Class probabilities of a prepared image, on the network's output grid.

    Parameters
    ----------
    prepared : Prepared
        Its image in the card's channels.
    ask : Ask
        Which head answers, how finely, with or without the mirror.

    Notes
    -----
    ``merged`` in the card's strategy numbers the networks that cannot tell left from right (those
    of sagittal slices): what they find is shared out evenly between the sides. A network with an
    age head is asked with every window of the fine answer; the mean is the scan's age. What
    float16 has no numbers for is computed again in float32.
    """
    strategy = {k: v for k, v in model.card.strategy.items() if k not in HOW_ASKED}
    if "overlap" in strategy and not ask.fine:
        strategy["overlap"] = 0.0  # finding the frame needs no smooth seams
    walk = partial(STRATEGIES[model.card.strategy["name"]], **strategy, each=model.crew.map)
    network = model.networks[SEGMENTER]
    factor = network.factor if ask.fine else network.stem
    image = prepared.image[None].to(model.device)
    ages: list[float] = []
    if ask.fine and getattr(getattr(network, "design", None), "age", 0):
        walk = partial(_hearing_ages, model, walk, ages)
    blends = hasattr(network, "body") and not network.coarse_only
    probabilities = (_blended if blends else _plain)(model, ask, image, walk)
    age = float(np.mean(sorted(ages))) if ages else None  # windows may end in any order
    grid = prepared.grid.coarser(factor, probabilities.shape[1:])
    precision = str(model.precision).removeprefix("torch.")
    found = Prediction(probabilities, grid, age, precision)
    if model.precision == torch.float16 and not found.is_finite:
        return segment(replace(model, precision=torch.float32), prepared, ask)
    return found


def _hearing_ages(
    model: Model, walk: Callable[..., Tensor], ages: list[float], predict: Callable[..., Tensor],
    image: Tensor, **options: Any,
) -> Tensor:  # fmt: skip
    """A walk that also notes the age, in years, that the segmenter reads from each window."""

    def heard(window: Tensor, *place: Any) -> Tensor:
        with torch.inference_mode():
            ages.extend(model.networks[SEGMENTER].predicted_age(window).tolist())
        return predict(window, *place)

    return walk(heard, image, **options)


def _plain(model: Model, ask: Ask, image: Tensor, walk: Callable[..., Tensor]) -> np.ndarray:
    """Probabilities (channels, i, j, k) at the resolution that the network itself answers in."""
    network, atlas = model.networks[SEGMENTER], _atlas(model, list(image.shape[2:]))
    several, merged = hasattr(network, "members"), model.card.strategy.get("merged", ())

    def predict(window: Tensor, corner: tuple[int, int, int], number: int = 0) -> Tensor:
        prior = _part(atlas, corner, window, network.stem)
        prior = None if prior is None else prior.float()
        member = number if several else None
        found = _answer(model, ask, window, prior, member)
        if ask.mirror:
            found = found.add_(_mirrored(model, ask, window, prior, member)).div_(2)
        if number in merged:
            found = (found + found[:, torch.as_tensor(model.heads[ask.head].mirror)]) / 2
        return found

    return walk(predict, image, factor=network.factor if ask.fine else network.stem).numpy()


def halved(card: ModelCard) -> bool:
    """Whether a card's segmenter sees one half of the brain as it is and the other mirrored."""
    return bool(card.strategy.get("halves", False))


def shown(card: ModelCard, shape: Sequence[int]) -> tuple[slice, slice, slice]:
    """The part of an image (I, J, K) that a card's segmenter sees, of it or of its mirror image.

    That without what its strategy trims from both ends, and of it as much along the first axis as
    one window has where the card halves the brain.
    """
    trims = card.strategy.get("trim", (0, 0, 0))
    ends = [n - trim for n, trim in zip(shape, trims, strict=True)]
    if halved(card):
        window = card.strategy["window"]
        ends[0] = min(ends[0], trims[0] + (window if isinstance(window, int) else window[0]))
    x, y, z = (slice(low, high) for low, high in zip(trims, ends, strict=True))
    return x, y, z


def one_window(model: Model, image: Tensor) -> bool:
    """Whether one window of the card's strategy covers an image (1, C, I, J, K)."""
    window = model.card.strategy.get("window", np.inf)
    return bool(np.all(np.asarray(window) >= np.asarray(image.shape[2:])))


@dataclass(frozen=True, eq=False)
class _Passes:
    """Passes of a network over what it sees of an image (1, C, I, J, K) and of its mirror image.

    `walk` goes over the windows; `prior` is what the network makes of the atlases, in the box.
    """

    model: Model
    ask: Ask
    image: Tensor
    walk: Callable[..., Tensor]
    prior: Seen | None

    @property
    def seen(self) -> tuple[slice, slice, slice]:
        """The part of the image that is seen."""
        return shown(self.model.card, self.image.shape[2:])

    @property
    def once(self) -> bool:
        """Whether one window sees all of it."""
        return one_window(self.model, self.image[(..., *self.seen)])

    def found(self, turned: bool) -> tuple[Tensor, Tensor | None]:
        """Coarse logits (channels, i, j, k) and, of a fine answer, the features beside them."""
        image = (self.image.flip(2) if turned else self.image)[(..., *self.seen)]
        predict, stem = partial(self._predict, turned), self.model.networks[SEGMENTER].stem
        if self.once:
            answers: list[tuple[Tensor, Tensor | None]] = []

            def alone(window: Tensor, first: tuple[int, int, int]) -> Tensor:
                answers.append(predict(window, first))
                return answers[0][0]

            self.walk(alone, image, factor=stem)
            logits, features = answers[0]
            return logits[0], None if features is None else features[0]
        # Seams are blended in half floats, which are finer than the bfloat16 that comes in.
        kept = torch.float32 if self.model.precision == torch.float32 else torch.float16

        def joined(window: Tensor, first: tuple[int, int, int]) -> Tensor:
            return join([one.to(kept) for one in predict(window, first) if one is not None])

        found, count = self.walk(joined, image, factor=stem), len(self.model.heads[self.ask.head])
        return found[:count], found[count:] if self.ask.fine else None

    def _predict(
        self, turned: bool, window: Tensor, first: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor | None]:
        network = self.model.networks[SEGMENTER]
        features = None if self.prior is None else self.prior.features[int(turned)]
        corner = [part.start + f for part, f in zip(self.seen, first, strict=True)]
        part = _part(features, corner, window, network.stem)
        with fast(self.model):
            return network.body(window, part, self.ask.head, self.ask.fine)


def _blended(
    model: Model, ask: Ask, image: Tensor, walk: Callable[..., Tensor]
) -> np.ndarray | SharedRows:
    """Probabilities (channels, i, j, k) of a network whose logits and features can be blended."""
    network, size = model.networks[SEGMENTER], image.shape[2:]
    stem, swap = network.stem, torch.as_tensor(model.heads[ask.head].mirror, device=model.device)
    prior, both = _seen(model, [n // stem for n in size]), ask.mirror or halved(model.card)
    passes = _Passes(model, ask, image, walk, prior)
    # Windows go side by side; where one sees all, the two sides of the mirror do.
    each = model.crew.map if passes.once else map
    found = list(each(passes.found, (False, True)[: 1 + both]))
    _, reach, *plane = found[0][0].shape
    seen = passes.seen
    whole = [(size[0] - 2 * seen[0].start) // stem if halved(model.card) else reach, *plane]
    corner = [part.start // stem for part in seen]
    around = Around([n + 2 * c for n, c in zip(whole, corner, strict=True)], corner)
    share = shares(whole[0], reach) if both else torch.ones(reach)
    sides = [Side(*found[0], share), *(Side(*one, share.flip(0), swap) for one in found[1:])]
    with torch.inference_mode():
        added = None if prior is None else prior.logits[ask.head]
        added = None if added is None else added[around.place(whole)]
        corrections = network.corrections(ask.head) if ask.fine else None
        coarse, sub = both_sides(sides, added, corrections, model.crew)
        if sub is not None:
            return refine(coarse, sub, _heat(model, ask.head), model.crew, around)
        shape = (*around.shape, len(swap))
        answer = torch.zeros(shape, dtype=torch.float16, device=coarse.device)
        answer[..., 0] = 1
        answer[around.place(whole)] = likely(coarse, crew=model.crew)
        return answer.permute(3, 0, 1, 2).cpu().numpy()

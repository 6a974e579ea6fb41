"""One seed decides everything, on every device."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Random:
    """Draws that one seed decides.

    What decides an example (which artefact, how strong, the control points of its deformation and
    of every smooth field) is drawn on the CPU, so that it is the same on every device and nobody
    waits for an accelerator to answer. Only white noise is drawn on the device itself, from a
    generator that is seeded anew for each draw. The state of `generator` is therefore all that a
    checkpoint has to keep.

    Parameters
    ----------
    seed : int
        Decides every draw.
    device : str or torch.device
        Where tensors are made.
    """

    def __init__(self, seed: int, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator(device=self.device)
        self._resident: WeakKeyDictionary[object, dict[str, Tensor]] = WeakKeyDictionary()

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        """A uniform number."""
        return low + (high - low) * float(torch.rand(1, generator=self.generator))

    def below(self, n: int) -> int:
        """A whole number from 0 to `n` - 1."""
        return int(torch.randint(n, (1,), generator=self.generator))

    def chance(self, share: float) -> bool:
        """True in `share` of the calls."""
        return self.one() < share

    def vector(self, *shape: int) -> Tensor:
        """Standard normal numbers on the CPU: a few that decide something."""
        return torch.randn(shape, generator=self.generator)

    def shares(self, *shape: int) -> Tensor:
        """Uniform numbers between 0 and 1 on the CPU."""
        return torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """White noise of unit variance, made on the device."""
        seed = int(torch.randint(2**62, (1,), generator=self.generator))
        self._noise.manual_seed(seed)
        return torch.randn(shape, generator=self._noise, device=self.device)

    def resident(self, owner: object, name: str, make: Callable[[], Tensor]) -> Tensor:
        """`make()` on this device: made once for each `owner` and `name`, then kept.

        It is forgotten with its owner.
        """
        kept = self._resident.setdefault(owner, {})
        if name not in kept:
            kept[name] = make().to(self.device)
        return kept[name]

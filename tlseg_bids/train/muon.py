"""Muon for the kernels of convolutions, AdamW for everything else, as one optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MATRICES, OTHERS = "matrices", "others"


class MuonAndAdamW:
    """PyTorch's two optimisers behind the interface of one.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes every step of a
    matrix orthogonal: all directions of it are learned at one pace, also those along which the
    gradient is small. The kernel of a 3-D convolution (out, in, k, k, k) counts as a matrix
    (out, in·k³). Steps are scaled so that one learning rate fits both optimisers (Liu et al. 2025,
    arXiv 2502.16982, section 2.2). Kernels of one voxel, which read classes or an atlas, biases and
    norms are left to AdamW, as the authors advise for the first and the last layer.

    Parameters
    ----------
    groups : list of dict
        ``params``, and what else AdamW takes or `set_rate` reads.
    rate, weight_decay : float
        Of both.
    """

    def __init__(self, groups: list[dict[str, Any]], rate: float, weight_decay: float) -> None:
        self.kernels = [p for group in groups for p in group["params"] if is_kernel(p)]
        self.views = [nn.Parameter(as_matrix(p.detach())) for p in self.kernels]
        rest = [
            {**group, "params": [p for p in group["params"] if not is_kernel(p)]}
            for group in groups
        ]
        self.parts = {
            MATRICES: torch.optim.Muon(
                self.views, rate, weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            OTHERS: torch.optim.AdamW(rest, rate, weight_decay=weight_decay),
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for kernel in self.kernels:
            kernel.grad = None
        self.parts[OTHERS].zero_grad(set_to_none)

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for kernel, view in zip(self.kernels, self.views, strict=True):
            view.grad = None if kernel.grad is None else as_matrix(kernel.grad, like=kernel)
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def is_kernel(parameter: Tensor) -> bool:
    """Whether it is the kernel of a convolution over more than one voxel."""
    return parameter.dim() == 5 and parameter[0, 0].numel() > 1


def as_matrix(kernel: Tensor, like: Tensor | None = None) -> Tensor:
    """(out, in, k, k, k) as (out, in·k³), its columns in the order in which `like` lies in memory.

    Of the kernel itself it is a view: who changes one changes the other.
    """
    if (kernel if like is None else like).is_contiguous():
        return kernel.reshape(len(kernel), -1)
    return kernel.permute(0, 2, 3, 4, 1).reshape(len(kernel), -1)

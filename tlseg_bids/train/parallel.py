"""The processes that share a run: one as a rule, several under `torchrun`.

Each process draws examples of its own and the gradients are averaged, so that a step of `n`
processes is a step of `n` times as many examples (synchronous data parallelism).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from tlseg_bids.errors import UsageError


@dataclass(frozen=True)
class Team:
    """This process among those of a run.

    Parameters
    ----------
    rank, world : int
        Number of this process, from 0, and how many there are.
    device : torch.device
        Where this process computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """The seed of this process's examples: `seed` itself for the first process."""
        if self.first:
            return seed
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.rank}".encode()).digest()[:7])

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return self._sum(values) / self.world

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(self._sum(torch.tensor([float(flag)])) > 0)

    def gather(self, values: Tensor) -> Tensor:
        """The tensors (…) of all processes, (world, …)."""
        if self.world == 1:
            return values[None]
        mine = values.to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        distributed.all_gather(found, mine)
        return torch.stack(found).to(values.device)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the mean gradient; a process without one counts as zero.

        A parameter that no process has a gradient for keeps none, as in a run of one process.
        """
        if self.world == 1:
            return
        every = list(parameters)
        has = torch.tensor([float(p.grad is not None) for p in every], device=self.device)
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in every]
        mean = self._sum(torch.cat([has, *(g.flatten() for g in flat)])) / self.world
        anyone = (mean[: len(every)] > 0).tolist()
        parts = mean[len(every) :].split([p.numel() for p in every])
        for p, part, found in zip(every, parts, anyone, strict=True):
            p.grad = part.view_as(p) if found else None

    def _sum(self, values: Tensor) -> Tensor:
        if self.world == 1:
            return values
        total = values.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """This process's place in the run that `torchrun` started; alone without `torchrun`.

    A `device` of ``cuda`` becomes the GPU of the process's number on its machine.

    Raises
    ------
    UsageError
        If there is no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    found = find_device(f"cuda:{local}" if device == "cuda" and world > 1 else device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if world == 1:
        yield Team(device=found)
        return
    distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield Team(distributed.get_rank(), distributed.get_world_size(), found)
        distributed.barrier()  # the first process may still be writing
    finally:
        distributed.destroy_process_group()


def find_device(name: str) -> torch.device:
    """The torch device of that name, if this machine has it.

    Raises
    ------
    UsageError
        If it has not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        raise UsageError(
            f"no device '{name}' on this machine, which has {count} CUDA devices",
            "--device", "use cpu, cuda or cuda:N; under torchrun one process for each GPU",
        ) from error  # fmt: skip
    return device


def prepare(device: torch.device, deterministic: bool) -> None:
    """Set how a GPU computes: TF32 where float32 is asked for, and the same results every time.

    Without `deterministic`, cuDNN times its algorithms and takes the fastest, which need not be
    the same in another run. See https://docs.pytorch.org/docs/stable/notes/randomness.html.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
